"""Plants known mistakes one at a time and shows that the tests, and `replace.verify` on SmolLM2, catch each.

    python tests/mutations.py [--only NAME ...] [--tests] [--verify] [--jobs N]

A mistake is an exact piece of source and what stands there instead; the working tree is never edited, since
a child process is given the changed source when it imports the module. The parent imports what is slow to
import, nothing of this project, and forks a child for each mistake. Exit code 0: every mistake is caught.
"""

import argparse
import importlib.abc
import importlib.machinery
import importlib.util
import os
import re
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import CodeType

import hydra
import hypothesis
import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, StaticCache
from transformers.models.gpt_neox import modeling_gpt_neox
from transformers.models.llama import modeling_llama
from transformers.models.phi3 import modeling_phi3
from transformers.models.qwen3 import modeling_qwen3

# Imported for the children's sake: a forked one finds them there.
SLOW = (hydra, hypothesis, transformers, AutoModelForCausalLM, AutoTokenizer, DynamicCache, StaticCache)
FAMILIES = (modeling_gpt_neox, modeling_llama, modeling_phi3, modeling_qwen3)

ROOT = Path(__file__).resolve().parent.parent
PROPERTIES = "tests/replace/test_properties.py"
RAISED, STILLBORN = 10, 11
"""Exit codes of a child that ended in an error while it measured, or before."""

# Small blocks, so that a short text shows everything; three of thirty layers.
SMALL = ["model=smollm2", "layers=every", "layers.k=10", "attention.block=8", "attention.window=8"]
SMALL += ["attention.sinks=2", "attention.distance_cap=24", "attention.pairs=6", "attention.pairs_recent=0.5"]
SETTINGS: dict[str, list[str]] = {
    "infini": ["attention=infini", *SMALL, "attention.pairs_score=learned"],
    "linear": ["attention=linear", *SMALL, "attention.pairs_score=key_norm", "attention.write_gate=token"],
    "elu": ["attention=infini", *SMALL, "attention.feature_map=elu", "attention.pairs_score=key_norm"],
    "window": ["attention=sliding_window", *SMALL, "attention.pairs_score=key_norm"],
}


@dataclass
class Mistake:
    """One mistake.

    Attributes:
        name: in words.
        edits: (file, what stands there exactly once, what is put there).
        tests: a file and an expression for pytest's `-k`.
        setting: of `SETTINGS`, what verify is run with.
    """

    name: str
    edits: list[tuple[str, str, str]]
    tests: tuple[str, str]
    setting: str = "infini"


@dataclass
class Run:
    """A child at work: its process, where it writes, and when it began."""

    mistake: Mistake | None
    kind: str
    process: int
    log: str
    setting: str = ""
    began: float = field(default_factory=time.monotonic)


MIXER, MEMORY, LAYER, LAYOUT = (
    "replace/mixer.py",
    "replace/memory.py",
    "replace/layer.py",
    "replace/layout.py",
)
STEP, GATES, SCORES, MAPS = (
    "replace/one_token.py",
    "replace/gates.py",
    "replace/scores.py",
    "replace/feature_maps.py",
)
INFINI, LINEAR, BLOCKS = "replace/attention/infini.py", "replace/attention/linear.py", "replace/blocks.py"
CHUNK, PAIRS = "kernels/linear_memory/chunk.py", "kernels/retained_pairs/chunk.py"
EXACT = "kernels/exact_attention/chunk.py"

MISTAKES = [
    Mistake(
        "the causal mask lets the next token through",
        [(MIXER, "& (key <= own)", "& (key <= own + 1)")],
        (PROPERTIES, "test_2_a_token and infini-token"),
    ),
    Mistake(
        "the memory is a mean over the batch",
        [
            (
                CHUNK,
                "M = (weighted / safe.unsqueeze(-1)).transpose(-1, -2) @ v\n",
                "M = (weighted / safe.unsqueeze(-1)).transpose(-1, -2) @ v\n"
                "    M = M.mean(0, keepdim=True).expand_as(M)\n",
            )
        ],
        (PROPERTIES, "test_3_rows and infini-token"),
    ),
    Mistake(
        "pads enter the memory as if they were text",
        [
            (
                MIXER,
                "if real is not None and state is None and call.document is None and bool(real.all()):",
                "if True:",
            )
        ],
        (PROPERTIES, "test_7_padding_changes and infini-token"),
    ),
    Mistake(
        "pads are not told to the layers",
        [
            (
                LAYER,
                "call.real = real_tokens(attention_mask, query.shape[2], seen)",
                "call.real = None",
            )
        ],
        (PROPERTIES, "test_7_padding_on_continued and infini-token"),
    ),
    Mistake(
        "a pad counts as a position when decoding",
        [(STEP, "length = before + 1 if new is None else before + new.long()", "length = before + 1")],
        (PROPERTIES, "test_7_padding_on_continued and infini-token"),
    ),
    Mistake(
        "the gate mixes an empty memory",
        [
            (
                INFINI,
                "gate = torch.where(held, grouped(gate, self.heads, blocks.layout.block), 0)",
                "gate = grouped(gate, self.heads, blocks.layout.block)",
            )
        ],
        (PROPERTIES, "test_1_everything_exact and infini-token"),
    ),
    Mistake(
        "the memory is detached",
        [
            (
                INFINI,
                "numerator, denominator, _ = self.remember(blocks, call)",
                "numerator, denominator, _ = (x.detach() for x in self.remember(blocks, call))",
            )
        ],
        (PROPERTIES, "test_13_gradients_reach and infini-token"),
    ),
    Mistake(
        "positions stay on the memory's keys",
        [(MEMORY, "if self.options.rotary and self.rotary is not None:", "if self.rotary is not None:")],
        (PROPERTIES, "test_4_mixer and infini-token"),
    ),
    Mistake(
        "query heads in the order of repeat",
        [
            (
                BLOCKS,
                ".unflatten(1, (heads.key_value, heads.repeat))",
                ".unflatten(1, (heads.repeat, heads.key_value)).transpose(1, 2)",
            )
        ],
        (PROPERTIES, "test_12_grouped and infini-token"),
    ),
    Mistake(
        "outputs come back with their heads in the order of repeat",
        [
            (
                MIXER,
                "return out.transpose(2, 3).flatten(3, 4).flatten(1, 2)",
                "return out.transpose(2, 3).flatten(3, 4).transpose(1, 2).flatten(1, 2)",
            )
        ],
        (PROPERTIES, "test_12_grouped and infini-token"),
    ),
    Mistake(
        "outputs are reshaped without a transpose",
        [
            (
                LAYER,
                "out.transpose(1, 2).contiguous()",
                "out.reshape(out.shape[0], out.shape[2], out.shape[1], out.shape[3])",
            )
        ],
        (PROPERTIES, "test_1_everything_exact and infini-token"),
    ),
    Mistake(
        "blocks are reshaped without a transpose",
        [
            (
                MIXER,
                "return out.transpose(2, 3).flatten(3, 4).flatten(1, 2)",
                "return out.reshape(len(out), -1, out.shape[2] * self.block, out.shape[-1])",
            )
        ],
        (PROPERTIES, "test_2_a_token and infini-token"),
    ),
    Mistake(
        "a second prefill drops the memory",
        [
            (
                MEMORY,
                "if state is not None and state.memory_M is not None:",
                "if state is not None and state.memory_M is not None and blocks.layout.tokens == 1:",
            )
        ],
        (PROPERTIES, "test_5_any_split and chunks and infini-token"),
    ),
    Mistake(
        "the memory stays in the module between calls",
        [
            (
                MEMORY,
                "        blocks.written = states\n",
                "        blocks.written = states\n"
                "        last = (x[:, :, -1].detach() for x in vars(states).values())\n"
                '        self.__dict__["kept"] = Memory(*last)\n',
            ),
            (
                MEMORY,
                "        sequences, groups, _, width = blocks.v.shape\n",
                '        kept = self.__dict__.get("kept")\n'
                "        if kept is not None and len(kept.M) == len(blocks.v):\n"
                "            return kept\n"
                "        sequences, groups, _, width = blocks.v.shape\n",
            ),
        ],
        (PROPERTIES, "test_15_calls and infini-token"),
    ),
    Mistake(
        "elu(x) + 1 as written",
        [(MAPS, "return x.relu() + x.clamp(max=0).exp()", "return torch.nn.functional.elu(x) + 1")],
        (PROPERTIES, "test_11_features_keep"),
        "elu",
    ),
    Mistake(
        "M is limited without z",
        [
            (
                CHUNK,
                "return Memory(M * scale.unsqueeze(-1), z * scale, n)",
                "return Memory(M * scale.unsqueeze(-1), z, n)",
            )
        ],
        (PROPERTIES, "test_16_a_limited_update and infini"),
    ),
    Mistake(
        "a non-finite token is masked by a product",
        [
            (
                MIXER,
                "k, v = torch.where(where, zero, k), ",
                "k, v = k * ~where, ",
            )
        ],
        (PROPERTIES, "test_2_later_blocks and infini-token"),
    ),
    Mistake(
        "one bad token takes its place from every row",
        [(MIXER, "bad = ~(k.sum(", "bad = ~(k.sum(0, keepdim=True).expand_as(k).sum(")],
        (PROPERTIES, "test_16_a_bad and infini-token"),
    ),
    Mistake(
        "M is divided by all tokens of the batch, z by its own",
        [(CHUNK, "M = (weighted / safe.unsqueeze(-1))", "M = (weighted / (len(v) * v.shape[-2]))")],
        (PROPERTIES, "test_4_mixer and infini-token"),
    ),
    Mistake(
        "a retained pair is in the linear memory too",
        [(LINEAR, "holds_retained = False", "holds_retained = True")],
        (PROPERTIES, "test_4_mixer and linear"),
        "linear",
    ),
    Mistake(
        "of equal scores the later is kept",
        [
            (
                PAIRS,
                "order = torch.argsort(pool_score, dim=-1, descending=True, stable=True)",
                "order = torch.argsort(pool_score.flip(-1), dim=-1, descending=True, stable=True)\n"
                "        order = pool_score.shape[-1] - 1 - order",
            )
        ],
        ("tests/kernels/test_retained_pairs.py", "test"),
    ),
    Mistake(
        "in recent places the older pairs are ahead",
        [(MIXER, "rank = rank + late", "rank = rank - late")],
        (PROPERTIES, "test_4_mixer and recent"),
    ),
    Mistake(
        "scores are pooled over the border of a block",
        [
            (
                SCORES,
                "        return torch.nn.functional.linear(x, self.weight.to(x.dtype),",
                "        pooled = torch.nn.functional.avg_pool1d(x.transpose(1, 2), 9, 1, 4)\n"
                "        x = pooled.transpose(1, 2)\n"
                "        return torch.nn.functional.linear(x, self.weight.to(x.dtype),",
            )
        ],
        (PROPERTIES, "test_4_and_5 and infini"),
    ),
    Mistake(
        "the write gate is missing in z",
        [(CHUNK, "z = weighted.sum(-2) / safe", "z = phi_k.sum(-2) / safe")],
        (PROPERTIES, "test_4_mixer and infini-token"),
    ),
    Mistake(
        "sinks are in the memory too",
        [
            (
                MIXER,
                "keep = (blocks.valid & (position >= self.options.sinks))",
                "keep = (blocks.valid & (position >= 0))",
            )
        ],
        (PROPERTIES, "test_4_mixer and infini-token"),
    ),
    Mistake(
        "queries and keys lose their length",
        [(MEMORY, "return wide(x) * scale", "return torch.nn.functional.normalize(wide(x), dim=-1) * scale")],
        (PROPERTIES, "test_4_mixer and infini-token"),
    ),
    Mistake(
        "a block is written before it is read",
        [
            (
                MEMORY,
                "return Memory(states.M[:, :, :-1], states.z[:, :, :-1], states.n[:, :, :-1])",
                "return Memory(states.M[:, :, 1:], states.z[:, :, 1:], states.n[:, :, 1:])",
            )
        ],
        (PROPERTIES, "test_2_a_token and infini-paper"),
    ),
    Mistake(
        "the memory is kept in the model's dtype",
        [
            (MEMORY, "memory_M=after.M,", "memory_M=after.M.to(blocks.v.dtype),"),
            (
                MEMORY,
                "return Memory(state.memory_M, state.memory_z, state.memory_n)",
                "return Memory(wide(state.memory_M), state.memory_z, state.memory_n)",
            ),
        ],
        (PROPERTIES, "test_11_half and infini-token"),
    ),
    Mistake(
        "a continued forward drops all but its first token",
        [
            (
                MIXER,
                "real = torch.ones(batch, tokens, dtype=torch.bool, device=query.device)\n",
                "real = torch.ones(batch, tokens, dtype=torch.bool, device=query.device)\n"
                "                real[:, 1:] = state is None\n",
            )
        ],
        (PROPERTIES, "test_4_and_5 and infini-token"),
    ),
    Mistake(
        "the read gate starts at -100",
        [(GATES, "torch.full((heads.query,), initial)", "torch.full((heads.query,), -100.0)")],
        (PROPERTIES, "test_14_gates and infini-token"),
    ),
    Mistake(
        "a block leaves one token late",
        [
            (
                LAYOUT,
                "return self.length // self.block - self.before // self.block",
                "return (self.length - 1) // self.block - (self.before - 1).clamp_min(0) // self.block",
            )
        ],
        (PROPERTIES, "test_4_and_5 and infini-token"),
    ),
    Mistake(
        "what has left can be read one block late",
        [
            (
                MEMORY,
                "return Memory(states.M[:, :, :-1], states.z[:, :, :-1], states.n[:, :, :-1])",
                "return Memory(*(torch.cat([x[:, :, :1], x[:, :, :-2]], 2) for x in vars(states).values()))",
            )
        ],
        (PROPERTIES, "test_4_mixer and infini-token"),
    ),
    Mistake(
        "packed documents share the state",
        [
            (
                MIXER,
                "layout = general_layout(real, call.document, before,",
                "layout = general_layout(real, None, before,",
            )
        ],
        (PROPERTIES, "test_17_packed and infini-token"),
    ),
    Mistake(
        "soft cap and learned sinks are ignored",
        [
            (
                MIXER,
                "if not (self.needs_mass or call.softcap is not None or call.sink_logit is not None):",
                "if not self.needs_mass:",
            )
        ],
        (PROPERTIES, "test_4_the_teacher and infini-token"),
    ),
    Mistake(
        "learned sinks are ignored by softmax",
        [(EXACT, "    if sink_logit is not None:\n        logits", "    if False:\n        logits")],
        (PROPERTIES, "test_4_the_teacher and infini-token"),
    ),
    Mistake(
        "the teacher's own window is ignored",
        [
            (
                MIXER,
                "mask = mask & (own - key < call.sliding_window)",
                "mask = mask & (own - key < own + 1)",
            )
        ],
        (PROPERTIES, "test_4_the_teacher and infini-token"),
        "window",
    ),
    Mistake(
        "decoding scales by the width of the heads, whatever the teacher's scaling",
        [(STEP, "        call.scaling,\n", "        query.shape[-1] ** -0.5,\n")],
        (PROPERTIES, "test_4_the_teacher and infini-token"),
    ),
    Mistake(
        "a decoded token does not see itself",
        [(STEP, "seen = (local >= 0) & (local <= before)", "seen = (local >= 0) & (local < before)")],
        (PROPERTIES, "test_5_any_split and decode and infini-token"),
    ),
    Mistake(
        "a decoded token's write gate is lost",
        [
            (
                MEMORY,
                "weight=torch.where(blocks.valid.unsqueeze(1), weight, state.weight)",
                "weight=state.weight",
            )
        ],
        (PROPERTIES, "test_4_and_5 and infini-token"),
    ),
]


class Changed(importlib.machinery.SourceFileLoader):
    """Loads a module from changed source; everything else about it is that of its file."""

    def __init__(self, name: str, path: str, source: str) -> None:
        super().__init__(name, path)
        self.source = source

    def get_code(self, fullname: str) -> CodeType:
        """Compiled anew, past any cache."""
        return compile(self.source, self.path, "exec", dont_inherit=True)


class Planter(importlib.abc.MetaPathFinder):
    """Finds the changed modules before anyone else does."""

    def __init__(self, sources: dict[str, str]) -> None:
        self.sources = {
            file.removesuffix(".py").replace("/", "."): (file, text) for file, text in sources.items()
        }

    def find_spec(self, fullname, path=None, target=None):
        """The spec of a changed module, or None."""
        if fullname not in self.sources:
            return None
        file, text = self.sources[fullname]
        place = str(ROOT / file)
        return importlib.util.spec_from_file_location(fullname, place, loader=Changed(fullname, place, text))


def changed_sources(mistake: Mistake) -> dict[str, str]:
    """File -> source with the mistake in it.

    Raises:
        ValueError: what is to be replaced does not stand there exactly once.
    """
    sources: dict[str, str] = {}
    for file, old, new in mistake.edits:
        text = sources.get(file) or (ROOT / file).read_text(encoding="utf-8")
        if text.count(old) != 1:
            raise ValueError(f"{mistake.name!r} is stale: {old!r} stands {text.count(old)} times in {file}")
        sources[file] = text.replace(old, new)
    return sources


def start(mistake: Mistake | None, kind: str, setting: str = "") -> Run:
    """Fork a child that runs the tests or verify, with the mistake or (None) with the sources as they are."""
    descriptor, log = tempfile.mkstemp(prefix="mutation")
    process = os.fork()
    if process:
        os.close(descriptor)
        return Run(mistake, kind, process, log, setting)
    code = STILLBORN
    try:
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        os.chdir(ROOT)
        sys.path.insert(0, str(ROOT))
        if mistake is not None:
            sys.meta_path.insert(0, Planter(changed_sources(mistake)))
        if kind == "tests":
            code = run_tests(mistake)
        else:
            measure = prepare_verify(setting)
            code = RAISED  # from here on an error is verify's answer to the mistake
            code = measure()
        sys.stdout.flush()
    finally:  # whatever happens, the child must end here
        if sys.exc_info()[0] is not None:
            traceback.print_exc()
        sys.stderr.flush()
        os._exit(code)


def run_tests(mistake: Mistake | None) -> int:
    """0: all passed, 1: some failed, anything else: pytest could not run them."""
    options = [
        "-q",
        "--import-mode=importlib",
        "-p",
        "no:cacheprovider",
        "--no-header",
        "-W",
        "ignore",
        "-o",
        "addopts=",
    ]
    if mistake is not None:
        return int(pytest.main([*options, "-x", mistake.tests[0], "-k", mistake.tests[1]]))
    wanted: dict[str, set[str]] = {}
    for one in MISTAKES:
        wanted.setdefault(one.tests[0], set()).add(f"({one.tests[1]})")
    codes = [int(pytest.main([*options, file, "-k", " or ".join(sorted(k))])) for file, k in wanted.items()]
    return max(codes)


def prepare_verify(setting: str) -> Callable[[], int]:
    """Import and load all; what is returned gives 0 if every property holds, 1 at the first that fails."""
    from replace.choice import layers_of, spec_of
    from replace.compose import compose
    from replace.loading import load_model
    from replace.properties.examine import examine

    config = compose(SETTINGS[setting])
    model = load_model(config.model).model

    def measure() -> int:
        for finding in examine(model, spec_of(config, layers_of(model))):
            if finding.passed is False:
                print(f"FAILED {finding.property} ({finding.figure:.1e}, limit {finding.limit:.0e})")
                return 1
        return 0

    return measure


def reason(text: str) -> str:
    """What failed, from a child's output."""
    failed = re.findall(r"^FAILED (.*?)(?: - .*)?$", text, re.M)
    raised = re.findall(r"^(?:\w+\.)*(\w+(?:Error|Exception)): (.*)$", text, re.M)
    if failed:
        return failed[0].rpartition("::")[2]
    return f"raised {raised[-1][0]}: {raised[-1][1][:80]}" if raised else ""


def main() -> int:
    """Run what is asked for and print one line for each mistake."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", action="append", default=[], help="a part of a mistake's name")
    parser.add_argument("--tests", action="store_true", help="the tests only")
    parser.add_argument("--verify", action="store_true", help="replace.verify only")
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1), help="children at a time")
    asked = parser.parse_args()
    torch.set_num_threads(1)  # threads do not survive a fork
    kinds = [kind for kind in ("tests", "verify") if getattr(asked, kind)] or ["tests", "verify"]
    chosen = [m for m in MISTAKES if not asked.only or any(part in m.name for part in asked.only)]
    for mistake in chosen:
        changed_sources(mistake)
    began = time.monotonic()
    todo: list[tuple[Mistake | None, str, str]] = []
    if "verify" in kinds:
        todo += [(None, "verify", setting) for setting in sorted({m.setting for m in chosen})]
    todo += [(None, "tests", "")] if "tests" in kinds and not asked.only else []
    todo += [(mistake, kind, mistake.setting) for mistake in chosen for kind in kinds]
    running: dict[int, Run] = {}
    caught, broken = dict.fromkeys(kinds, 0), 0
    while todo or running:
        while todo and len(running) < asked.jobs:
            run = start(*todo.pop(0))
            running[run.process] = run
        process, status = os.wait()
        run = running.pop(process)
        code = os.waitstatus_to_exitcode(status)
        text = Path(run.log).read_text(encoding="utf-8", errors="replace")
        os.unlink(run.log)
        seconds = time.monotonic() - run.began
        if run.mistake is None:
            good, name = code == 0, f"the sources {run.setting}".strip()
            word = "as they are" if good else "BROKEN"
        else:
            # Pytest's other codes say that nothing was tested; verify may also end in an error.
            good = code == 1 or (run.kind == "verify" and code == RAISED)
            word, name = ("caught" if good else "MISSED"), run.mistake.name
            caught[run.kind] += good
        broken += not good
        print(f"{word:11} {run.kind:6} {seconds:5.0f} s  {name}: {reason(text)}", flush=True)
        if not good:
            print(text[-3000:], flush=True)
    shares = ", ".join(f"{kind} {count}/{len(chosen)}" for kind, count in caught.items())
    print(f"caught/planted: {shares}; {time.monotonic() - began:.0f} s", flush=True)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
