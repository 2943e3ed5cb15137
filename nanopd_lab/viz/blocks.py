"""The block pool of a recorded run: who owns which block, what is shared, cached, free, and wasted."""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.patches import Patch, Rectangle

from nanopd_lab.engine.trace import StepRecord, Table, Trace
from nanopd_lab.viz.style import FAINT, INK, PAPER, REQUESTS, WAITING, LabFigure, figure

CACHED = "#EDEFF2"
MOST_BLOCKS = 256
LABEL = {"boxstyle": "round,pad=0.15", "facecolor": PAPER, "linewidth": 0, "alpha": 0.85}


def letter(request: int) -> str:
    """A for the first request."""
    return chr(ord("A") + request % 26)


def owners(record: StepRecord) -> dict[int, list[Table]]:
    """The tables that hold each block in use."""
    found: dict[int, list[Table]] = {}
    for table in record.tables:
        for block in table.blocks:
            found.setdefault(block, []).append(table)
    return found


def filled(record: StepRecord, block_size: int) -> dict[int, int]:
    """Tokens in each block in use; of several owners the one that has written most counts."""
    found: dict[int, int] = {}
    for table in record.tables:
        for position, block in enumerate(table.blocks):
            tokens = min(block_size, max(0, table.tokens - position * block_size))
            found[block] = max(found.get(block, 0), tokens)
    return found


def block_view(trace: Trace, step: int, columns: int = 8) -> LabFigure:
    """The pool on the left, block by block, and the sequences' block tables on the right, after one step.

    Args:
        step: 1 for the run's first; 0 for the moment before it

    Raises:
        ValueError: the run has no such step, or used too many blocks
    """
    if not 0 <= step <= len(trace.steps):
        raise ValueError(f"step is {step}; this run has steps 1 to {len(trace.steps)}, and 0 before them")
    now = trace.steps[step - 1] if step else StepRecord(0, 0, (), len(trace.outputs), 0, 0, 0)
    highest = max((block for r in trace.steps for t in r.tables for block in t.blocks), default=0)
    rows = highest // columns + 1  # what was never used is left out
    if rows * columns > MOST_BLOCKS:
        raise ValueError(
            f"the run used {highest + 1} blocks, and {MOST_BLOCKS} can be drawn; take a smaller pool"
        )
    # As high as the step with the most sequences needs, so that the picture does not jump.
    most = max(len(record.tables) for record in trace.steps)
    lines = max(rows, 0.62 * most + 1)
    fig = figure(9.6, 1.8 + 0.52 * lines)
    pool, tables = fig.subplots(1, 2, width_ratios=(1, 1.15))
    for ax, width in ((pool, columns), (tables, columns * 1.15)):
        ax.set(xlim=(0, width), ylim=(lines, -0.1))
        ax.set_axis_off()
    _pool(pool, trace, now, range(min(trace.num_blocks, rows * columns)), columns)
    _tables(tables, trace, now)
    moment = f"step {step} of {len(trace.steps)}" if step else "before the first step"
    queue = f"{now.running} running, {now.waiting} waiting, {now.finished} of {len(trace.outputs)} finished"
    fig.suptitle(f"{moment}: {queue}", x=0.01, ha="left", fontsize=12, weight="bold", color=INK)
    tokens, slots = sum(filled(now, trace.block_size).values()), now.blocks_used * trace.block_size
    waste = f", {slots - tokens} of {slots} slots empty" if slots else ""
    pool.set_title(
        f"pool: {now.blocks_used} of {trace.num_blocks} blocks in use{waste}", loc="left", fontsize=10
    )
    tables.set_title("block tables: which block holds which part", loc="left", fontsize=10)
    _legend(fig, trace)
    return fig


def _pool(ax: Axes, trace: Trace, now: StepRecord, blocks: range, columns: int) -> None:
    owned, tokens = owners(now), filled(now, trace.block_size)
    for block in blocks:
        x, y = block % columns + 0.04, block // columns + 0.06
        if block in owned:
            who = owned[block]
            width = 0.92 * tokens[block] / trace.block_size
            ax.add_patch(
                Rectangle((x, y), 0.92, 0.86, facecolor=PAPER, edgecolor=WAITING, hatch="////", linewidth=0)
            )
            colour = REQUESTS[who[0].request % len(REQUESTS)]
            ax.add_patch(Rectangle((x, y), width, 0.86, facecolor=colour, linewidth=0))
            shared = len(who) > 1
            edge = INK if shared else colour
            ax.add_patch(
                Rectangle((x, y), 0.92, 0.86, fill=False, edgecolor=edge, linewidth=2.4 if shared else 1)
            )
            name = letter(who[0].request) + (f"×{len(who)}" if shared else "")
            ax.text(
                x + 0.46,
                y + 0.5,
                name,
                ha="center",
                va="center",
                fontsize=10,
                color=INK,
                weight="bold",
                bbox=LABEL,
            )
        else:
            cached = block in now.cached
            colour, line = (CACHED, "-") if cached else (PAPER, ":")
            ax.add_patch(
                Rectangle(
                    (x, y), 0.92, 0.86, facecolor=colour, edgecolor=WAITING, linestyle=line, linewidth=1
                )
            )
            if cached:
                ax.text(x + 0.46, y + 0.5, "cached", ha="center", va="center", fontsize=8, color=FAINT)
        ax.text(x + 0.06, y + 0.07, str(block), ha="left", va="top", fontsize=7, color=INK, bbox=LABEL)


def _tables(ax: Axes, trace: Trace, now: StepRecord) -> None:
    shared = {block for block, who in owners(now).items() if len(who) > 1}
    longest = max((len(table.blocks) for record in trace.steps for table in record.tables), default=1)
    room = ax.get_xlim()[1] - 1.1
    side = min(0.72, room / longest)
    for line, table in enumerate(now.tables):
        y = 0.05 + 0.62 * line
        samples = sum(other.request == table.request for other in now.tables)
        name = letter(table.request) + (f".{table.sample + 1}" if samples > 1 else "")
        ax.text(0.85, y + 0.26, name, ha="right", va="center", fontsize=10, weight="bold", color=INK)
        colour = REQUESTS[table.request % len(REQUESTS)]
        for position, block in enumerate(table.blocks):
            tokens = min(trace.block_size, max(0, table.tokens - position * trace.block_size))
            x, width = 1.0 + position * side, side * 0.9
            ax.add_patch(
                Rectangle(
                    (x, y), width * tokens / trace.block_size, 0.52, facecolor=colour, alpha=0.35, linewidth=0
                )
            )
            edge, thick = (INK, 2.2) if block in shared else (colour, 1.2)
            ax.add_patch(Rectangle((x, y), width, 0.52, fill=False, edgecolor=edge, linewidth=thick))
            ax.text(x + width / 2, y + 0.26, str(block), ha="center", va="center", fontsize=9, color=INK)


def _legend(fig: LabFigure, trace: Trace) -> None:
    looks = [
        Patch(facecolor=REQUESTS[0], edgecolor=REQUESTS[0], label="tokens of a sequence"),
        Patch(
            facecolor=PAPER, edgecolor=WAITING, hatch="////", label="wasted: empty slots of its last block"
        ),
        Patch(facecolor=PAPER, edgecolor=INK, linewidth=2.4, label="shared"),
        Patch(facecolor=CACHED, edgecolor=WAITING, label="cached, no owner"),
        Patch(facecolor=PAPER, edgecolor=WAITING, linestyle=":", label="free"),
    ]
    fig.legend(handles=looks, loc="outside lower center", ncols=5, frameon=False, fontsize=9)


# ---------------------------------------------------------------------- waste

# How memory can be set aside for a sequence, worst first. Paged is what the engine did.
POLICIES = ("the model's limit", "prompt + max_tokens", "paged")
LOOKS = {POLICIES[0]: "#D55E00", POLICIES[1]: "#E69F00", POLICIES[2]: "#009E73", "tokens": INK}


def reserved_slots(trace: Trace, max_model_len: int) -> dict[str, list[int]]:
    """Token slots set aside after each step, by policy, and the `tokens` really there.

    The contiguous policies are computed for the very sequences that ran: one piece for each, as long as it may
    ever get, which is either the model's limit or its prompt and `max_tokens`.
    """
    found: dict[str, list[int]] = {name: [] for name in (*POLICIES, "tokens")}
    for record in trace.steps:
        found[POLICIES[0]].append(max_model_len * len(record.tables))
        found[POLICIES[1]].append(sum(table.most_tokens for table in record.tables))
        found[POLICIES[2]].append(trace.block_size * len(owners(record)))
        found["tokens"].append(sum(filled(record, trace.block_size).values()))
    return found


def used_share(slots: dict[str, list[int]]) -> dict[str, float]:
    """For each policy the share of the slots set aside that held a token, over the whole run."""
    tokens = sum(slots["tokens"])
    return {name: tokens / max(1, sum(slots[name])) for name in POLICIES}


def waste_view(trace: Trace, max_model_len: int) -> LabFigure:
    """Slots set aside over the steps of a run, and the share of them that was used."""
    slots = reserved_slots(trace, max_model_len)
    fig = figure(9.6, 3.9)
    lines, bars = fig.subplots(1, 2, width_ratios=(1.5, 1))
    steps = range(1, len(trace.steps) + 1)
    for name in POLICIES:
        lines.plot(steps, slots[name], color=LOOKS[name], linewidth=2, drawstyle="steps-mid", label=name)
    lines.fill_between(
        steps, slots["tokens"], color=LOOKS["tokens"], alpha=0.18, step="mid", label="tokens really stored"
    )
    lines.set_yscale("log")
    lines.set(xlabel="step", ylabel="token slots set aside (log scale)")
    lines.set_ylim(bottom=0.6 * min(tokens for tokens in slots["tokens"] if tokens))
    lines.legend(loc="center", frameon=False, fontsize=9)
    share = used_share(slots)
    names = list(reversed(POLICIES))
    bars.barh(names, [100 * share[name] for name in names], color=[LOOKS[name] for name in names], height=0.6)
    for row, name in enumerate(names):
        bars.text(
            100 * share[name] + 2, row, f"{100 * share[name]:.0f} %", va="center", fontsize=10, color=INK
        )
    bars.set(xlim=(0, 118), xlabel="slots that held a token, of all set aside (%)")
    for ax in (lines, bars):
        ax.spines[["top", "right"]].set_visible(False)
        ax.tick_params(labelsize=9)
    return fig
