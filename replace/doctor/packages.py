"""The packages: what the project requires, what it can use, and whether they can be imported."""

import importlib.util
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

from replace.doctor.probes import ask

PROJECT = "layer-replace"
ROOT = Path(__file__).resolve().parents[2]
INSIDE = "replace.doctor.inside"


@dataclass(frozen=True)
class Library:
    """A package that a run can use: its module, and its distributions, the first the one to install."""

    module: str
    distributions: tuple[str, ...]
    purpose: str


LIBRARIES = (
    Library("triton", ("triton",), "fused kernels"),
    Library("fla", ("fla-core", "flash-linear-attention"), "kernels to compare with"),
    Library("flash_attn", ("flash-attn",), "softmax attention; torch brings its own"),
    Library("unsloth", ("unsloth",), "lora=unsloth"),
    Library("peft", ("peft",), "lora=peft"),
    Library("xformers", ("xformers",), "softmax_backend=xformers"),
    Library("bitsandbytes", ("bitsandbytes",), "4-bit weights"),
    Library("wandb", ("wandb",), "logger=wandb"),
    Library("torchvision", ("torchvision",), "nothing here; transformers imports it"),
)


@dataclass
class Found:
    """What became of a library: `state` is absent, works or broken; `why` says what is broken."""

    state: str
    version: str | None = None
    why: str | None = None


def libraries(limit: float) -> dict[str, dict]:
    """Every library by its module's name. Those that are there are imported, each in a process of its own."""
    with ThreadPoolExecutor(max_workers=2) as pool:
        found = pool.map(lambda library: _library(library, limit), LIBRARIES)
        return {library.module: asdict(one) for library, one in zip(LIBRARIES, found, strict=True)}


def _library(library: Library, limit: float) -> Found:
    version = next(filter(None, map(version_of, library.distributions)), None)
    if version is None and importlib.util.find_spec(library.module) is None:
        return Found("absent")
    answer = ask(INSIDE, "imports", library.module, limit=limit)
    return Found("broken" if answer.why else "works", version or answer.facts.get("version"), answer.why)


def version_of(distribution: str) -> str | None:
    """The version of an installed distribution, None where there is none."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def requirements() -> list[str]:
    """What the project needs, as its pyproject.toml says, or the metadata of its installed wheel."""
    import tomllib  # here, for it is not in a Python that is too old

    file = ROOT / "pyproject.toml"
    if file.is_file():
        project = tomllib.loads(file.read_text(encoding="utf-8")).get("project", {})
        if project.get("name") == PROJECT:
            return list(project["dependencies"])
    return [one for one in metadata.requires(PROJECT) or [] if "extra ==" not in one]


def unmet() -> list[dict[str, str | None]]:
    """The requirements that are not met: `{"requirement", "version"}`, None where nothing is installed."""
    from packaging.requirements import Requirement  # here, for it is somebody else's and may be missing

    found: list[dict[str, str | None]] = []
    for requirement in map(Requirement, requirements()):
        if requirement.marker is not None and not requirement.marker.evaluate():
            continue
        version = version_of(requirement.name)
        if version is None or not requirement.specifier.contains(version, prereleases=True):
            found.append({"requirement": f"{requirement.name}{requirement.specifier}", "version": version})
    return found


def kernels_facts() -> dict[str, str | bool | None]:
    """Hugging Face's distribution `kernels`, if it is here, and whether the folder found is still ours."""
    spec = importlib.util.find_spec("kernels")
    places = list(spec.submodule_search_locations or []) if spec is not None else []
    ours = any(Path(place).resolve() == ROOT / "kernels" for place in places)
    return {"other": version_of("kernels"), "ours": ours}
