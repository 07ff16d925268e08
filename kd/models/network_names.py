"""Names of networks, split into their parts: source, network, arguments, file of weights.

A list of names is separated by commas; a comma in brackets or in a path that exists belongs to the
name. `kd.models.networks` says what the names mean.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from dsdistill.harness.errors import UserError
from kd.models.zoo import (
    builtin,
    exported,
    huggingface,
    timm_zoo,
    torchvision_zoo,
    user_modules,
    weight_files,
    weights,
)
from kd.models.zoo.protocol import Zoo

FOLDER_PREFIXES = ("hf", "local-dir")  # prefixes of a folder's path
# Prefix of a name -> the zoo that knows the rest. Names without a prefix are timm's.
ZOOS: Mapping[str, Zoo] = {
    "timm": timm_zoo,
    "torchvision": torchvision_zoo,
    "hf": huggingface,
}


@dataclass(frozen=True)
class NetworkName:
    """The parts of a network's name.

    Attributes:
        zoo: The zoo that has the network; None for a built-in one.
        base: Name of the network in the zoo.
        file: File of its weights, where the name has one.
        text: The whole name without the file.
    """

    zoo: Zoo | None
    base: str
    file: Path | None
    text: str

    @property
    def convert(self) -> weights.Converter | None:
        """The library's own conversion of weights in another form; None where it has none."""
        return timm_zoo.convert if self.zoo is timm_zoo else None


def parse(name: str) -> NetworkName:
    """Split a name into its parts, without checking that such a network exists.

    Raises:
        UserError: For the file of an exported program, from which no network can be built.
    """
    if name.endswith(exported.SUFFIX):
        raise UserError(
            f"{name} is an exported program, which cannot be trained: use it as teacher"
        )
    text, file = _split_file(name)
    prefix, colon, rest = text.partition(":")
    base = text
    if prefix in builtin.NETWORKS:
        zoo: Zoo | None = None
    elif colon and prefix in ZOOS:
        zoo, base = ZOOS[prefix], rest
    elif user_modules.matches(text):
        zoo = user_modules
    else:
        zoo = timm_zoo
    return NetworkName(zoo, base, file, text)


def split_names(text: str) -> list[str]:
    """The names in a comma-separated list.

    A comma in brackets belongs to the arguments of a network, and a comma in a path that exists
    belongs to the path.
    """
    parts, names = text.split(","), []
    while parts:
        joined = [",".join(parts[: n + 1]) for n in range(len(parts))]
        there = [n for n, name in enumerate(joined) if n and _has_existing_path(name.strip())]
        whole = [n for n, name in enumerate(joined) if _brackets_are_closed(name)]
        n = max(there) if there else whole[0] if whole else 0
        names.append(joined[n].strip())
        parts = parts[n + 1 :]
    return [name for name in names if name]


def names_in(*lists: str | None) -> list[str]:
    """The names in comma-separated lists, of which None has none."""
    return [name for text in lists for name in split_names(text or "")]


def parse_names(option: str, text: str) -> list[str]:
    """The names in a list, which must be distinct.

    Args:
        option: The option, for the message.
        text: Value of the option.

    Raises:
        UserError: If the list is empty, or has a name twice.
    """
    names = split_names(text)
    if not names:
        raise UserError(f"{option} must name at least one")
    if len(set(names)) < len(names):
        raise UserError(f"{option} names one twice: {text}")
    return names


def absolute_name(name: str) -> str:
    """Make a path in the name absolute, if it exists, so that the name holds in every folder."""
    if not name:  # Path("") would be the working directory
        return name
    if (path := Path(name).expanduser()).exists():
        return str(path.resolve())
    before, file = _split_file(name)
    after = f"@{file.resolve()}" if file and file.exists() else name[len(before) :]
    prefix, _, rest = before.partition(":")
    if prefix in FOLDER_PREFIXES and (path := Path(rest).expanduser()).exists():
        before = f"{prefix}:{path.resolve()}"
    return before + after


def _has_existing_path(name: str) -> bool:
    """Whether the name is, or contains, a path that exists."""
    if any(_path_exists(Path(path).expanduser()) for path in (name, _strip_folder_prefix(name))):
        return True
    before, file = _split_file(name)
    # A file behind the last of several names does not make them one name.
    return file is not None and _path_exists(file) and len(split_names(before)) == 1


def _brackets_are_closed(name: str) -> bool:
    return all(name.count(a) <= name.count(b) for a, b in ("()", "[]", "{}"))


def _split_file(name: str) -> tuple[str, Path | None]:
    """Split `NAME@FILE`; of several `@`, the one before an existing file counts."""
    at = [i for i, character in enumerate(name[:-1]) if character == "@" and i]
    at = [i for i in at if _brackets_are_closed(name[:i])]  # not one inside an argument
    if not at or _path_exists(Path(name)) or _path_exists(Path(_strip_folder_prefix(name))):
        return name, None
    for i in at:
        if _path_exists(file := Path(name[i + 1 :]).expanduser()) and file.is_file():
            return name[:i], file
    # hf-hub:timm/resnet18@main names a revision; any other name, a file that does not exist.
    if "/" in name[: at[0]] and Path(name).suffix not in weight_files.SUFFIXES:
        return name, None
    return name[: at[0]], Path(name[at[0] + 1 :]).expanduser()


def _strip_folder_prefix(name: str) -> str:
    """The path in `hf:DIR` and `local-dir:DIR`; other names as they are."""
    prefix, _, rest = name.partition(":")
    return rest if prefix in FOLDER_PREFIXES and rest else name


def _path_exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a name that is too long for any file
        return False
