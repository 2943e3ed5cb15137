"""Seconds of steps, prompts and pulls by the outlook's cost model; what is asked again is remembered."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from nanopd_lab.cost.iteration import SHORT_CHUNK, StepFeatures

if TYPE_CHECKING:
    from nanopd_lab.cost.iteration import IterationModel
    from nanopd_lab.router.outlook import Outlook


class Batches(dict[int, float]):
    """Decode steps by the number of sequences, without their context, s; worked out when it is asked for."""

    def __init__(self, model: IterationModel) -> None:
        self.model = model

    def __missing__(self, batch: int) -> float:
        found = self[batch] = self.model.decode_run(batch, 0)(1) if batch else 0.0
        return found


class StepCosts:
    """Seconds of steps and prompts by the outlook's cost model; what is asked again is remembered."""

    def __init__(self, outlook: Outlook) -> None:
        self.model = outlook.iteration
        self.budget = outlook.max_num_batched_tokens
        self.transfer = outlook.transfer
        self.block_bytes, self.block_size = outlook.block_bytes, outlook.block_size
        self.wait_steps = 1.5 if outlook.ahead else 0.5  # until a step takes in who comes while others run
        self.host_s, self._read_s = self.model.host_s, self.model.context_s
        self._pair_s, self._short_pair_s = self.model.pair_s, self.model.short_pair_s
        self.context_s = self.model.pair_s + self.model.context_s
        self._prompts: dict[int, float] = {}
        self._beside: dict[int, Beside] = {}
        self._shared: dict[tuple[int, int], float] = {}
        self.batches = Batches(self.model)
        self._pulls: dict[int, float] = {}  # by blocks
        self._steps: dict[tuple[int, int], float] = {}
        self.rest_s = self.prompt(self.budget) / 2  # of a full step
        self.token_s = 2 * self.rest_s / self.budget

    def decode(self, batch: int, context: float) -> float:
        """One decode step of `batch` sequences with `context` tokens together."""
        seconds = self.batches[batch] + self.context_s * context
        return seconds if seconds > self.host_s else self.host_s

    def mixed(self, batch: int, context: float, chunks: Sequence[tuple[int, int]]) -> float:
        """One step of `batch` decodes and chunks of (past, count) tokens."""
        tokens, pairs, short, read = 0, 0.0, 0.0, 0
        for past, count in chunks:
            of_chunk = count * (past + count / 2)
            tokens += count
            read += past + count
            pairs += of_chunk
            if 1 < count < SHORT_CHUNK:
                short += of_chunk
        return self.step(batch, context, len(chunks), tokens, pairs, short, read)

    def step(
        self, batch: int, context: float, chunks: int, tokens: int, pairs: float, short: float, read: int
    ) -> float:
        """As `mixed`, of sums over the chunks; the products' share in steps of 16 tokens."""
        tokens += batch
        key = (tokens + 15) >> 4, (batch + chunks + 7) >> 3
        fixed = self._steps.get(key)
        if fixed is None:
            rows, sequences = 16 * key[0], 8 * key[1]
            drawn = sequences if tokens > sequences else 0
            fixed = self.model.device_seconds(StepFeatures(rows, sequences, 0.0, 0, drawn))
            self._steps[key] = fixed
        fixed += (
            self._pair_s * (batch / 2 + pairs) + self._short_pair_s * short + self._read_s * (batch + read)
        )
        seconds = fixed + self.context_s * context
        return seconds if seconds > self.host_s else self.host_s

    def prompt(self, tokens: int) -> float:
        """A prompt alone on its worker, chunk by chunk."""
        found = self._prompts.get(tokens)
        if found is None:
            if len(self._prompts) > 1 << 14:
                self._prompts.clear()
            found = self._prompts[tokens] = self.walk(tokens, 0)
        return found

    def queued(self, tokens: int, count: int) -> float:
        """So many prompts of about this length, which share steps."""
        together = min(self.budget // tokens, count)
        if together < 2:
            return count * self.prompt(tokens)
        key = -(-tokens // 32), together
        found = self._shared.get(key)
        if found is None:
            found = self._shared[key] = self.mixed(0, 0, [(0, tokens)] * together) / together
        return count * found

    def queued_beside(self, tokens: int, count: int, batch: int) -> float:
        """What so many prompts of about this length, which share steps, add to the steps of `batch` decodes, s.

        Where one prompt alone hides behind the reading of weights, several don't.
        """
        together = min(max(1, self.budget - batch) // tokens, count)
        if together < 2:
            return count * self.beside(tokens, batch)
        every = together * tokens
        pairs = every * (tokens / 2)
        step_s = self.step(
            batch, 0, together, every, pairs, pairs if 1 < tokens < SHORT_CHUNK else 0.0, every
        )
        added_s = step_s - self.decode(batch, 0)
        return count / together * added_s if added_s > 0.0 else 0.0

    def beside(self, tokens: int, batch: int) -> float:
        """What a prompt adds to the steps of `batch` decodes, s; in steps of sizes, as it is asked often."""
        return self.beside_all(tokens)[-(-batch // 8)]

    def beside_all(self, tokens: int) -> Beside:
        """`beside` of a prompt, by eighths of the batch, rounded up."""
        size = -(-tokens // 32)
        found = self._beside.get(size)
        if found is None:
            found = self._beside[size] = Beside(self, 32 * size)
        return found

    def walk(self, tokens: int, batch: int) -> float:
        """A prompt in chunks beside so many decodes."""
        room = max(1, self.budget - batch)
        if tokens <= room:
            pairs = tokens * (tokens / 2)
            return self.step(batch, 0, 1, tokens, pairs, pairs if 1 < tokens < SHORT_CHUNK else 0.0, tokens)
        seconds, past = 0.0, 0
        while past < tokens:
            count = min(room, tokens - past)
            seconds += self.mixed(batch, 0, [(past, count)])
            past += count
        return seconds

    def pull(self, tokens: int) -> float:
        """The whole KV of a prompt, over an idle link."""
        if self.transfer is None:
            return 0.0
        blocks = -(-tokens // self.block_size)
        found = self._pulls.get(blocks)
        if found is None:
            found = self._pulls[blocks] = self.transfer.seconds(blocks, blocks * self.block_bytes)
        return found

    def pulls(self, tokens: int) -> tuple[float, float]:
        """(of the whole KV, of what can be seen of it) of a prompt."""
        whole = self.pull(tokens)
        if tokens <= self.budget:
            return whole, whole
        # Chunks before the last are pulled while the next is computed.
        return whole, self.pull(tokens - (tokens - 1) // self.budget * self.budget)


class Beside(dict[int, float]):
    """What one prompt adds to the steps of decodes, s, by eighths of their number; worked out when it is asked for."""

    def __init__(self, costs: StepCosts, tokens: int) -> None:
        self.costs, self.tokens = costs, tokens

    def __missing__(self, eighths: int) -> float:
        costs, batch = self.costs, 8 * eighths
        steps = -(-self.tokens // max(1, costs.budget - batch))
        found = costs.walk(self.tokens, batch) - steps * costs.decode(batch, 0)
        self[eighths] = found = max(found, 0.0)
        return found
