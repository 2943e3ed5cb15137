"""Compiling the model with torch.compile, one decoder layer for all.

    off       Hugging Face's operators as they are (with our attention and products)
    default   the small operators between attention and products fused; compiled once with symbolic sizes
    tuned     also searches the fastest product kernels, for each captured decode step; minutes the first time

Every layer has the same code and the same shapes, so the first one's compilation serves them all ("regional
compilation"); results are kept on disk by torch (TORCHINDUCTOR_CACHE_DIR), and a warm start only loads them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from nanopd_lab.model.inference import InferenceLinear


def compile_model(model: Any, mode: str, *, few_rows: bool = False) -> None:
    """Have the decoder layers, the final norm and, when tuned, the vocabulary projection compiled on first use;
    what they were compiled to before is put aside.

    Args:
        mode: "off", "default" or "tuned"
        few_rows: for steps that our product kernel serves: it adds the residual, and since kernels are short then,
            each begins while the one before it ends (programmatic dependent launch)
    """
    head = model.get_output_embeddings()
    layers: list[nn.Module] = [*model.base_model.layers, model.base_model.norm]
    for part in (*layers, head):
        part._compiled_call_impl = None
    for module in model.modules():
        if isinstance(module, InferenceLinear):
            module.search = mode == "tuned"
    if mode == "off":
        return
    import torch._inductor.config
    import torch.fx.experimental._config

    # Symbolic sizes that happen to be equal in the first batch must not be taken to be equal in all.
    torch.fx.experimental._config.use_duck_shape = False
    # One compilation for one row and one for more; tuned ones for every captured size besides.
    torch._dynamo.config.cache_size_limit = max(64, torch._dynamo.config.cache_size_limit)
    inductor: dict[str, Any] = {}
    if few_rows:
        inductor["post_grad_custom_post_pass"] = add_in_products()
        if torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0):
            inductor["triton.enable_pdl"] = True
    if mode == "tuned":
        inductor |= {"max_autotune": True, "coordinate_descent_tuning": True}
    for part in (*layers, head) if mode == "tuned" else layers:
        part.compile(dynamic=mode == "default", options=inductor)


def add_in_products() -> Any:
    """A graph pass: `residual + product` becomes one operator, which adds where it writes its result anyway."""
    from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files

    class AddInProducts(CustomGraphPass):
        def __call__(self, graph: torch.fx.Graph) -> None:
            for node in list(graph.nodes):
                if node.target is torch.ops.aten.add.Tensor and not node.kwargs:
                    _merge(graph, node)
            graph.eliminate_dead_code()

        def uuid(self) -> bytes:  # a key of torch's cache on disk
            return get_hash_for_files((__file__,))

    return AddInProducts()


def _merge(graph: torch.fx.Graph, add: torch.fx.Node) -> None:
    for residual, product in (add.args[:2], add.args[1::-1]):
        views = []
        while isinstance(product, torch.fx.Node) and product.target is torch.ops.aten.view.default:
            views.append(product)
            product = product.args[0]
        if (
            not isinstance(product, torch.fx.Node)
            or not isinstance(residual, torch.fx.Node)
            or product.target is not torch.ops.nanopd.linear.default
            or any(len(node.users) != 1 for node in (*views, product))
        ):
            continue
        with graph.inserting_before(add):
            merged = graph.call_function(torch.ops.nanopd.linear_add.default, (*product.args, residual))
        merged.meta.update(add.meta)
        add.replace_all_uses_with(merged)
        graph.erase_node(add)
        return
