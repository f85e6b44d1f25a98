"""Speed and memory of surgery on a large checkpoint: an 8B-shaped random model, fused without calibration.

    python benchmarks/streaming.py /scratch

Needs about 50 GB of disk in the folder given. Prints the seconds of a plain copy of the files and of `fuse` in a
process of its own, and that process's peak resident memory.
"""

import argparse
import json
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch
from transformers import LlamaConfig

from ffn_fusion import Plan
from ffn_fusion.hf.checkpoint import ShardWriter, Spec
from ffn_fusion.hf.model import expected_specs
from ffn_fusion.hf.remote.configuration_ffn_fusion import FusedLlamaConfig

SIZES = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128_256,
    "head_dim": 128,
}
FUSE = """
import resource, sys
from ffn_fusion.cli import main
try:
    main(sys.argv[1:])
finally:
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def write_parent(folder: Path) -> None:
    """A random checkpoint of the shape of Llama-3.1-8B, 16 GB in four shards."""
    folder.mkdir(parents=True)
    config = LlamaConfig(**SIZES, rope_parameters={"rope_type": "default", "rope_theta": 5e5}, dtype="bfloat16")
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    entry = {
        "attention": {"no_op": False, "n_heads_in_group": 4},
        "ffn": {"no_op": False, "intermediate_size": SIZES["intermediate_size"]},
    }
    shapes, _ = expected_specs(FusedLlamaConfig(**SIZES, block_configs=[entry] * SIZES["num_hidden_layers"]))
    specs = {name: Spec(shape, torch.bfloat16) for name, shape in shapes.items()}
    with ShardWriter(folder, specs, max_shard_bytes=4_500_000_000) as writer:
        for name, spec in specs.items():
            writer.write(name, torch.empty(spec.shape, dtype=spec.dtype).normal_(std=0.02))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    parent, copy, student = folder / "parent", folder / "copy", folder / "student"
    if not parent.is_dir():
        write_parent(parent)
    num_bytes = sum(path.stat().st_size for path in parent.glob("*.safetensors"))
    start = time.perf_counter()
    shutil.copytree(parent, copy)
    copied = time.perf_counter() - start
    shutil.rmtree(copy)
    plan = Plan.identity(SIZES["num_hidden_layers"]).without_attention(range(17, 29))
    plan = plan.fuse(range(17, 23)).fuse(range(23, 28))
    command = [sys.executable, "-c", FUSE, "fuse", str(parent), "--plan", str(plan), "--out", str(student)]
    start = time.perf_counter()
    done = subprocess.run([*command, "--calibrate", "none"], check=True, capture_output=True, text=True)
    fused = time.perf_counter() - start
    shutil.rmtree(student)
    peak_kib = int(done.stdout.split()[-1])
    figures = {
        "parent_gb": num_bytes / 1e9,
        "copy_s": round(copied, 1),
        "fuse_s": round(fused, 1),
        "speed_of_fuse_over_copy": round(copied / fused, 2),
        "peak_resident_gb": round(peak_kib * 1024 / 1e9, 2),
        "own_peak_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9, 2),
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
