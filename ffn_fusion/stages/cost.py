"""`cost`: what each variant of a sublayer takes on this device, and how well the sums predict whole models."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from ffn_fusion.core.cost import BlockShape, shapes_of
from ffn_fusion.core.cost_records import Checked, CostResult
from ffn_fusion.core.cost_table import Communication, CostTable, Kind, Measured, Scenario, SublayerTime, Timing
from ffn_fusion.core.fusion import padded_width
from ffn_fusion.core.plan import Block, Plan
from ffn_fusion.errors import UserError
from ffn_fusion.folder import Environment, Record, StageFolder, run_stage
from ffn_fusion.hf.machine import DTYPES, pick_device, pick_dtype, where
from ffn_fusion.hf.model import ModelFolder
from ffn_fusion.hf.remote.configuration_ffn_fusion import WIDTH_MULTIPLE
from ffn_fusion.hf.resolve import resolve_model
from ffn_fusion.settings import Dtype, Machine, Positive
from ffn_fusion.speed.collectives import measure_communication
from ffn_fusion.speed.ranks import check_ranks
from ffn_fusion.speed.stacks import Stack, facts_of, time_stacks

WIDTHS = (1 / 8, 1 / 4, 1 / 2, 1, 2, 4)
"""FFN widths that are timed, in widths of the parent's widest; the last are fused ones."""
FUSED = 3
"""FFNs in each group of a plan that the table is checked on: a width between those that are timed."""
CUT = 3 / 8
"""Share of its channels that a cut FFN of such a plan keeps, likewise."""
LEAST_DEPTH = 2
_Times = tuple[Sequence[float], Sequence[float]]


@dataclass(frozen=True)
class _Timed:
    """Milliseconds of every stack in every repeat."""

    times: list[list[float]]
    how: str
    note: str


@dataclass(frozen=True)
class _Whole:
    """A whole model that the table is checked on."""

    name: str
    plan: Plan
    shapes: list[BlockShape]


@dataclass(frozen=True)
class _Variant:
    """A sublayer and how many blocks of it are timed in a stack."""

    kind: Kind
    size: int
    num_blocks: int

    @property
    def shape(self) -> BlockShape:
        kv_heads, width = (self.size if self.kind == kind else 0 for kind in ("attention", "ffn"))
        return BlockShape(kv_heads, width, linear_ffn=self.kind == "linear")


def cost(
    model: str,
    *,
    out: Path,
    batch_size: Positive = 1,
    prompt_length: Positive = 128,
    new_tokens: Positive = 128,
    tensor_parallel: Positive = 1,
    widths: tuple[Positive, ...] = (),
    repeats: Positive = 20,
    device: str = "auto",
    dtype: Dtype = "auto",
) -> Record[CostResult]:
    """Time every variant of a sublayer on a model's shapes, and check that the times add up.

    Parameters
    ----------
    model
        Folder, GGUF file, Hub id or builtin:smollm2-135m; only its shapes are used, so that with --dtype a folder of
        config.json alone will do.
    out
        New folder for the record.
    batch_size
        Sequences at once.
    prompt_length
        Tokens of a prompt.
    new_tokens
        Tokens decoded after it; a decode step is timed in their middle.
    tensor_parallel
        Devices that each sublayer is split over: one device's slice is timed, and the all-reduce across them.
    widths
        FFN widths to time besides the model's own; without it, an eighth to four times of it.
    repeats
        Timed repeats of each stack, all stacks in turn, after the warm-up.
    device
        "auto" (the first GPU, else the CPU), "cpu", "cuda" or "cuda:1".
    dtype
        Arithmetic; "auto" is the checkpoint's own.
    """
    machine = Machine(device=device, dtype=dtype)
    parent, place = resolve_model(model, weights=False), pick_device(machine)
    check_ranks(tensor_parallel, place)
    kind = DTYPES.get(dtype) or pick_dtype(machine, parent.checkpoint)
    scenario = Scenario(batch_size, prompt_length, new_tokens)
    inputs = {"model": parent.fingerprint, "scenario": vars(scenario), "tensor_parallel": tensor_parallel}
    inputs |= {"widths": widths, "repeats": repeats, "dtype": str(kind), "device": where(machine, kind).device}
    measure = _Measure(parent, scenario, tensor_parallel, widths, repeats, place, kind)

    def work(folder: StageFolder) -> tuple[CostResult, Environment]:
        environment = where(machine, kind)
        return measure.result(model, environment, folder), environment

    return run_stage("cost", out, inputs, CostResult, work)


@dataclass(frozen=True)
class _Measure:
    parent: ModelFolder
    scenario: Scenario
    ranks: int
    widths: tuple[int, ...]
    repeats: int
    device: torch.device
    dtype: torch.dtype

    def result(self, model: str, environment: Environment, folder: StageFolder) -> CostResult:
        communication = folder.remember("communication", Communication, self.communication)
        depth = self.parent.num_layers
        while True:
            variants, wholes = variants_of(self.parent, self.widths, self.ranks, depth), wholes_of(self.parent, depth)
            timed = self.both(variants, wholes, depth, folder)
            if timed is not None:
                break
            depth //= 2
            if depth < LEAST_DEPTH:
                raise UserError(
                    f"the memory of {environment.device} does not hold {2 * depth} blocks of {model} with their kv "
                    "cache; give a smaller --batch-size or --prompt-length, or split over devices by --tensor-parallel"
                )
            torch.cuda.empty_cache()
        prefill, decode = timed
        stacks = list(zip(prefill.times, decode.times, strict=True))
        offset, *rest = stacks
        rows = [
            SublayerTime(v.kind, v.size, v.num_blocks, _timing(own, offset, v.num_blocks))
            for v, own in zip(variants, rest, strict=False)
        ]
        table = CostTable(
            device=environment.device,
            dtype=environment.dtype,
            bytes_per_value=self.dtype.itemsize,
            torch=environment.versions["torch"],
            how=decode.how if decode.how == prefill.how else f"decode {decode.how}, prefill {prefill.how}",
            scenario=self.scenario,
            tensor_parallel=self.ranks,
            facts=facts_of(self.parent),
            num_layers=self.parent.num_layers,
            offset=_timing(offset),
            rows=rows,
            communication=communication,
        )
        measured = map(_timing, rest[len(variants) :])
        check = [_checked(table.alone(), whole, own) for whole, own in zip(wholes, measured, strict=True)]
        return CostResult(
            model=model,
            table=table,
            depth=depth,
            repeats=self.repeats,
            check=check,
            worst_prefill_error=max((row.prefill_error for row in check), key=abs),
            worst_decode_error=max((row.decode_error for row in check), key=abs),
            note="; ".join(sorted({phase.note for phase in timed} - {""})),
        )

    def communication(self) -> Communication:
        config = self.parent.config
        return measure_communication(
            self.ranks, self.scenario, config.hidden_size, config.vocab_size, self.dtype, self.device
        )

    def both(
        self, variants: list[_Variant], wholes: list[_Whole], depth: int, folder: StageFolder
    ) -> tuple[_Timed, _Timed] | None:
        """Prefill and decode of a model without blocks, of a stack of each variant and of each whole model, in this
        order; None if memory does not suffice."""
        scenario = self.scenario
        phases = {"prefill": (0, scenario.prompt_length), "decode": (scenario.context - 1, 1)}
        timed = []
        for phase, (past, new) in phases.items():
            measure = partial(self.timed, variants, wholes, phase, past, new)
            try:
                timed.append(folder.remember(f"{phase}, {depth} blocks", _Timed, measure))
            except torch.OutOfMemoryError:
                return None
        return timed[0], timed[1]

    def timed(self, variants: list[_Variant], wholes: list[_Whole], phase: str, past: int, new: int) -> _Timed:
        stacks = [Stack(self.parent, [], ranks=self.ranks)]
        stacks += [Stack(self.parent, [v.shape] * v.num_blocks, ranks=self.ranks) for v in variants]
        for whole in wholes:
            layers = [block.layers[0] for block in whole.plan.blocks]
            stacks.append(Stack(self.parent, whole.shapes, layers, self.ranks))
        batch = self.scenario.batch_size
        times, steps = time_stacks(stacks, (batch, past, new), self.repeats, self.device, self.dtype, f"cost: {phase}")
        hows = sorted({step.how for step in steps})
        return _Timed(times, " and ".join(hows), next((step.note for step in steps if step.note), ""))


def variants_of(parent: ModelFolder, widths: Sequence[int], ranks: int, depth: int) -> list[_Variant]:
    """Every number of kv heads that divides one of the parent's, FFNs of several widths, and a linear layer.

    No stack is larger than the parent's own FFNs or attentions; sizes that do not split over the ranks are left out.
    """
    shapes = parent.shapes
    held = {shape.kv_heads for shape in shapes} - {0}
    heads = {k for most in held for k in range(1, most + 1) if most % k == 0 and (k % ranks == 0 or ranks % k == 0)}
    own = {shape.ffn_width for shape in shapes} - {0}
    widest = max(own)
    asked = widths or [padded_width(int(share * widest), WIDTH_MULTIPLE) for share in WIDTHS]
    uneven = next((width for width in widths if width % ranks), None)
    if uneven:
        raise UserError(f"--widths {uneven} does not split over {ranks} devices")
    sizes = sorted(width for width in own | set(asked) if width % ranks == 0)
    found = [_Variant("attention", k, depth) for k in sorted(heads)]
    found += [_Variant("ffn", w, min(depth, max(LEAST_DEPTH, depth * widest // w))) for w in sizes]
    return found + ([_Variant("linear", 0, depth)] if parent.config.hidden_size % ranks == 0 else [])


def wholes_of(parent: ModelFolder, depth: int) -> list[_Whole]:
    """The parent and three plans of its first layers: attentions removed, FFNs fused, sublayers made smaller."""
    base = Plan(parent.plan.blocks[:depth])
    attentions = base.attention_layers
    fused = base.without_attention([layer for at, layer in enumerate(attentions) if at % FUSED])
    for run in fused.runs():
        for start in range(0, len(run), FUSED):
            fused = fused.fuse(run[start : start + FUSED])
    plans = {
        "every other attention removed": base.without_attention(attentions[1::2]),
        f"FFNs fused by {FUSED}": fused,
        "every other block made smaller": Plan(
            tuple(_smaller(block, parent) if at % 2 else block for at, block in enumerate(base.blocks))
        ),
    }
    wholes = [_Whole("as it is", base, shapes_of(base.blocks, parent.shapes))]
    return wholes + [
        _Whole(name, plan, shapes_of(plan.blocks, parent.shapes, WIDTH_MULTIPLE)) for name, plan in plans.items()
    ]


def _smaller(block: Block, parent: ModelFolder) -> Block:
    attention = replace(block.attention, kv_heads=1) if block.attention else None
    return Block(attention, tuple(replace(f, width=int(CUT * parent.shapes[f.layer].ffn_width)) for f in block.ffns))


def _timing(stack: _Times, empty: _Times = ((), ()), parts: int = 1) -> Timing:
    """Of repeats of a prefill and of a decode step, less those of a model without blocks."""
    return Timing(*(Measured.of(own, other, parts) for own, other in zip(stack, empty, strict=True)))


def _checked(table: CostTable, whole: _Whole, measured: Timing) -> Checked:
    prefill, decode = table.prefill_ms(whole.shapes), table.decode_ms(whole.shapes)
    return Checked(
        name=whole.name,
        plan=str(whole.plan),
        measured=measured,
        predicted_prefill_ms=prefill,
        predicted_decode_ms=decode,
        prefill_error=prefill / measured.prefill.ms - 1,
        decode_error=decode / measured.decode.ms - 1,
    )
