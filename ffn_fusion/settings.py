"""Options that several verbs share. Each field is an option of the command line and an argument of the Python API."""

from dataclasses import asdict, dataclass, fields
from typing import Annotated, Any, Literal

from cyclopts import Parameter
from cyclopts.validators import Number

Dtype = Literal["auto", "bf16", "fp16", "fp32"]
Method = Literal["mip", "greedy", "random", "max-params", "shortgpt", "llm-drop", "drop-layers"]
Above0 = Annotated[float, Parameter(validator=Number(gt=0))]
TwoOrMore = Annotated[int, Parameter(validator=Number(gte=2))]
Share = Annotated[float, Parameter(validator=Number(gt=0, lte=1))]
Positive = Annotated[int, Parameter(validator=Number(gte=1))]
NotNegative = Annotated[int, Parameter(validator=Number(gte=0))]


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Machine:
    """Where and how to compute.

    Parameters
    ----------
    device
        "auto" (the first GPU, else the CPU), "cpu", "cuda", "cuda:1", or "balanced" to spread a model over GPUs.
    dtype
        Arithmetic; "auto" is the checkpoint's own.
    batch_size
        Windows computed at once.
    trust_remote_code
        Let a tokenizer run code from the model's folder. Model code from there is never run.
    """

    device: str = "auto"
    dtype: Dtype = "auto"
    batch_size: Positive = 4
    trust_remote_code: bool = False


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Text:
    """Text to measure and calibrate on.

    Parameters
    ----------
    text
        Files, folders, JSONL or parquet files, Hub datasets (owner/name:split), or builtin:NAME (wikipedia, novels,
        maths, code, dialogue); give the option again for each.
    column
        Column of JSONL, parquet and Hub datasets: of text, or of chats (lists of messages with role and content); where
        there is no "text", "messages" is read.
    length
        Tokens in a window.
    seed
        Seed that picks the windows.
    """

    text: tuple[str, ...] = ("builtin:wikipedia",)
    column: str = "text"
    length: TwoOrMore = 512
    seed: int = 0


# A verb's own defaults are a class: of a default value of `Text`, the command line would keep nothing once one of its
# options is given.
@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class LongText(Text):
    length: TwoOrMore = 1024


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class HeldOutText(LongText):
    text: tuple[str, ...] = ("builtin:novels",)


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Prompts(HeldOutText):
    length: TwoOrMore = 64


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Space:
    """What may stand in the place of a layer, beside leaving an attention, an FFN or the whole layer out.

    Parameters
    ----------
    widths
        Widths of a narrower FFN, as shares of the parent's; give the option again for each.
    kv_heads
        Kv heads of a narrower attention; give the option again for each; without it, every divisor of the parent's.
    linear
        Also one linear layer in the place of an attention or an FFN, which few engines run.
    """

    widths: tuple[float, ...] = (0.75, 0.5, 0.25)
    kv_heads: tuple[Positive, ...] | None = None
    linear: bool = False


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Fusion:
    """How FFNs are fused and made narrower.

    Parameters
    ----------
    norm
        "folded" keeps each member's norm gain, "last" uses the last member's norm for all (the paper's rule).
    calibrate
        Refit the down projections of changed blocks to the parent's own stream, to the unfused run, or not at all.
    channel_steps
        Steps in which channels of a narrower FFN are chosen; what those that are left contribute is measured in each.
    """

    norm: Literal["folded", "last"] = "folded"
    calibrate: Literal["parent", "unfused", "none"] = "parent"
    channel_steps: Positive = 1

    @property
    def inputs(self) -> dict[str, Any]:
        """What a stage's inputs say of it; a single step is left out, so that results from before stay valid."""
        said = asdict(self)
        if self.channel_steps == 1:
            del said["channel_steps"]
        return said


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Blocks:
    """Which blocks to train: those that a plan changes, blocks by name, and variants of every layer.

    Parameters
    ----------
    plan
        A plan whose changed blocks are trained, in any form that `fuse` reads.
    blocks
        A block, such as -F6, A6F6:1024 or -F7+8; give the option again for each.
    kv_heads
        Every attention with its kv heads merged into so many; again for each number.
    widths
        Every FFN cut to so many channels; again for each width.
    no_attention
        Every layer but the first without its attention.
    no_ffn
        Every layer without its FFN.
    """

    plan: str | None = None
    blocks: tuple[str, ...] = ()
    kv_heads: tuple[Positive, ...] = ()
    widths: tuple[Positive, ...] = ()
    no_attention: bool = False
    no_ffn: bool = False


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Budget:
    """How far to go. At least one of the first two is needed.

    Parameters
    ----------
    remove_attention
        How many attentions to remove.
    max_kl
        KL to the parent, in nats a token, that neither removing nor fusing may exceed.
    fusion_slack
        Without `max_kl`: how far fused and calibrated may exceed the KL of the unfused plan, as a share of it.
    max_fused_width
        Widest fused FFN, in channels.
    skip_last
        Leave the last FFN of each run out of its group, as the paper does.
    candidates
        Attentions re-scored in each greedy step.
    trials
        Fused candidates built, calibrated and measured at most.
    """

    remove_attention: Positive | None = None
    max_kl: float | None = None
    fusion_slack: float = 0.25
    max_fused_width: Positive | None = None
    skip_last: bool = False
    candidates: Positive = 6
    trials: Positive = 8


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Grouping:
    """How FFNs are put into fused groups, where no hardware budget has the solver do it.

    Parameters
    ----------
    grouping
        "measured" fuses least dependent neighbours first, as far as the measured KL allows; "paper" fills each
        attention-free run from its first FFN on; "threshold" keeps FFNs apart that depend on each other too much.
    max_dependency
        For "threshold": the largest dependency between two FFNs of a group, as in the matrix of `analyze`.
    """

    grouping: Literal["measured", "paper", "threshold"] = "measured"
    max_dependency: float | None = None


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Limits:
    """The hardware budget, any combination. Times are for the request that the costs were measured for.

    Parameters
    ----------
    speedup
        Decode this many times faster than the parent.
    latency_ms
        Milliseconds of a decode step.
    throughput
        New tokens a second, over the whole batch, prefill included.
    memory_gb
        Weights and kv cache, in 10^9 bytes.
    kv_bytes
        Kv cache bytes a token.
    parameters
        Parameters, embeddings included.
    sublayers
        Sequential sublayers.
    sweep
        Also find a plan for each of these speedups; the report draws them as a front.
    """

    speedup: Above0 | None = None
    latency_ms: Above0 | None = None
    throughput: Above0 | None = None
    memory_gb: Above0 | None = None
    kv_bytes: Positive | None = None
    parameters: Positive | None = None
    sublayers: Positive | None = None
    sweep: tuple[Above0, ...] = ()

    @property
    def given(self) -> str:
        """The option of the first limit that is set; empty if none is."""
        return next((f"--{field.name.replace('_', '-')}" for field in fields(self) if getattr(self, field.name)), "")


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Tasks:
    """Benchmark tasks (docs/evaluation.md lists them); `score` takes those whose answers are offered.

    Parameters
    ----------
    tasks
        Tasks, comma-separated: quick, paper, commonsense; any task, group or task file of lm-evaluation-harness;
        mt_bench, arena_hard, agreement; niah_single@4096, niah_multikey@4096, vt@4096, at any length.
    limit
        First items of each task only; `score` takes 100 without it.
    num_fewshot
        Examples shown before each item of the harness' tasks; without it, the customary number.
    chat
        Put items to the model through its chat template: where that is customary, always, or never.
    data
        Your own data, TASK=FILE or TASK=FOLDER of files named by split (JSONL, parquet, arrow); again for each task.
    """

    tasks: tuple[str, ...] = ()
    limit: Positive | None = None
    num_fewshot: NotNegative | None = None
    chat: Literal["auto", "always", "never"] = "auto"
    data: tuple[str, ...] = ()


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Judging:
    """The judge of mt_bench and arena_hard.

    Parameters
    ----------
    judge
        URL of an OpenAI-style endpoint, such as http://localhost:8000/v1.
    judge_model
        The model's name there; without it, the first one listed.
    judge_key
        Environment variable that holds the key.
    judge_timeout
        Seconds that a reply may take.
    """

    judge: str | None = None
    judge_model: str | None = None
    judge_key: str = "OPENAI_API_KEY"
    judge_timeout: float = 120.0
