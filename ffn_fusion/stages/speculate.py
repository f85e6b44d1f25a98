"""`speculate`: a draft model proposes and its target verifies; how much is accepted, and how fast that is."""

import json
import sys
from pathlib import Path
from typing import Any, Literal

from ffn_fusion.core.engine_records import SpeculateResult
from ffn_fusion.core.records import Sample
from ffn_fusion.errors import UserError
from ffn_fusion.folder import Environment, Record, StageFolder, run_stage
from ffn_fusion.hf.machine import pick_device, pick_dtype, where
from ffn_fusion.hf.resolve import load_tokenizer, resolve_model
from ffn_fusion.hf.text import read_windows
from ffn_fusion.serving.engines import ENGINES, Installed
from ffn_fusion.serving.hf import check_engine
from ffn_fusion.settings import Machine, Positive, Prompts, TwoOrMore


def speculate(
    target: str,
    draft: str,
    *,
    out: Path,
    engine: Literal["transformers", "vllm"] = "transformers",
    draft_tokens: Positive = 4,
    windows: Positive = 8,
    new_tokens: TwoOrMore = 64,
    engine_python: str = sys.executable,
    untested: bool = False,
    text: Prompts = Prompts(),  # noqa: B008, frozen
    machine: Machine = Machine(),  # noqa: B008
) -> Record[SpeculateResult]:
    """Decode greedily with and without a draft model. A student is a natural draft of its parent: same tokenizer,
    no training, and the output stays the parent's.

    Parameters
    ----------
    target
        Model whose output is wanted: folder, GGUF file, Hub id or builtin:smollm2-135m.
    draft
        Model that proposes tokens: a student of the target, or of its parent.
    out
        New folder for the record.
    engine
        transformers or vllm.
    draft_tokens
        Tokens proposed in each round.
    windows
        Prompts; each is a window of the text, 64 tokens unless told otherwise.
    new_tokens
        Tokens decoded after each prompt.
    engine_python
        Python that has the engine, if it is not this one.
    untested
        Go on with an engine version outside the tested range.
    """
    models = [resolve_model(target), resolve_model(draft)]
    for model in models:
        check_engine(model, engine)
    sizes = [model.config.vocab_size for model in models]
    if sizes[0] != sizes[1]:
        raise UserError(
            f"a draft shares its target's vocabulary; {target} has {sizes[0]:,} tokens, {draft} {sizes[1]:,}"
        )
    prompts = read_windows(text, load_tokenizer(models[0], machine.trust_remote_code), windows)
    dtype = pick_dtype(machine, models[0].checkpoint)
    options = {
        "dtype": str(dtype).removeprefix("torch."),
        "device": str(pick_device(machine)),
        "draft_tokens": draft_tokens,
    }
    chosen = ENGINES[engine]
    installed = Installed(chosen, engine_python, chosen.version(engine_python, untested), options)
    inputs = {
        "models": [model.fingerprint for model in models],
        "engine": [installed.name, installed.version],
        "text": prompts.sample.digest,
        "new_tokens": new_tokens,
        **options,
    }

    def work(folder: StageFolder) -> tuple[SpeculateResult, Environment]:
        answer = folder.state / "answer.json"
        request = {"model": models[0].folder, "draft": models[1].folder, "prompts": prompts.ids.tolist()}
        assert chosen.draft_probe
        installed.run(chosen.draft_probe, {**request, "new_tokens": new_tokens, "answer": answer}, folder.state)
        found = json.loads(answer.read_text(encoding="utf-8"))
        return _result(target, draft, installed, prompts.sample, found), where(machine, dtype)

    return run_stage("speculate", out, inputs, SpeculateResult, work)


def _result(target: str, draft: str, installed: Installed, sample: Sample, found: dict[str, Any]) -> SpeculateResult:
    plain, drafted = found["plain"], found["drafted"]
    if not (found["rounds"] and found["proposed"]):
        raise UserError(f"{installed.name} {installed.version} decoded without the draft: it counted no proposals")
    return SpeculateResult(
        target=target,
        draft=draft,
        engine=installed.name,
        version=installed.version,
        draft_tokens=installed.options["draft_tokens"],
        num_prompts=len(plain),
        new_tokens=len(plain[0][0]),
        sample=sample,
        rounds=found["rounds"],
        proposed=found["proposed"],
        accepted=found["accepted"],
        plain_seconds=sum(seconds for _, seconds in plain),
        drafted_seconds=sum(seconds for _, seconds in drafted),
        equal_prompts=sum(a == b for (a, _), (b, _) in zip(plain, drafted, strict=True)),
    )
