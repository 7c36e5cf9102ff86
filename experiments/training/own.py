"""Models, data sets, optimizers, schedules, metrics that are not shipped: classes of a grid's file, or of a
module beside it.

Such a class is a frozen dataclass below one of the bases of its kind. A config names it by its definition: the name of
the class, its file, and a hash of its source, so that a changed model gives new runs. Hashed are the statements of the
file that the class uses, directly or through others, in modules beside it too; comments, docstrings and layout are
not. A grid's folder keeps the files (`keep`), and a worker imports them from there (`load`). Whoever reads results
reads the definition as data and imports nothing.
"""

import ast
import dataclasses
import functools
import hashlib
import importlib.util
import json
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn

from experiments.training import record
from experiments.training.settings import Settings

DEFINITION = "class_definition"  # its key in config.json; analysis shows what ends with _definition as one cell
FOLDER = "sources"  # in a grid's folder: SHA/FILE for every version of the sources that its runs were made from
SHIPPED = ("lpsim", "lmd", "experiments", "analysis")
RIGHT = "define it at the top level of the grid's file, or of a module beside it that the grid imports"


@dataclass(frozen=True)
class Model(Settings):
    """Base of a model of your own.

    It has a `name`, a field or a class attribute, which tables show; the data set's `inputs`; and `build`. A data set
    asks more of it, as fields or class attributes: the shipped ones image_size, channels and classes, or context and
    vocab_size. What one of your own asks (`DataSet.check_model`) is between the two of them.
    """

    inputs: ClassVar[str]  # "tokens", "images", or a word of your own

    if TYPE_CHECKING:  # a field or a class attribute of the subclass

        @property
        def name(self) -> str: ...

    def build(self) -> nn.Module:
        """The model with fresh weights, drawn from torch's global random state, which is seeded by the run's seed.

        It maps a batch of inputs to logits, whose last dimension is the classes.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class DataSet(Settings):
    """Base of a data set of your own: a `name`, `inputs` and `load`."""

    inputs: ClassVar[str]

    if TYPE_CHECKING:  # a field or a class attribute of the subclass

        @property
        def name(self) -> str: ...

    def check_model(self, model: Any) -> None:
        """Raise ValueError, by `self.require`, for a model that does not fit."""

    def load(self, model: Any) -> Any:
        """What the training loop draws batches from: `experiments.training.data.Data`; `ImageArrays` is one."""
        raise NotImplementedError

    def fingerprint(self) -> str:
        """A hash of the contents, by which a resumed grid sees that they have changed.

        This one is of the definition alone: override it where `load` reads files.
        """
        return hashlib.sha256(json.dumps(to_dict(self), sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Metric(Settings):
    """Base of a metric of your own: `measure`, and a `name`, under which it stands beside the validation loss in
    metrics.jsonl, and as `final.NAME` in tables.
    """

    if TYPE_CHECKING:  # a field or a class attribute of the subclass

        @property
        def name(self) -> str: ...

    def measure(self, model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> float:
        """One number of the model and the held-out split; inputs and targets come as the training loop has them.

        Called at every validation: the model is in evaluation mode, without gradients, at the posterior mean. Its
        products are rounded by the run's recipe, and so would be a matrix product of yours. `batches` can be gone
        through once. torch's random numbers begin at the run's seed.
        """
        raise NotImplementedError


def to_dict(part: Settings) -> dict[str, Any]:
    """The part as JSON values: its name, its fields, its definition."""
    return {"name": getattr(part, "name", ""), **part.to_dict(), DEFINITION: definition(type(part))}


def from_dict(data: Mapping[str, Any], sources: Path | None, what: str) -> Settings:
    """The part that `to_dict` wrote, of the class in `sources`. Raises ValueError."""
    cls = load(data[DEFINITION], sources, what)
    fields = {field.name for field in dataclasses.fields(cls)}
    left_out = {DEFINITION, "name"} - fields
    return cls.from_dict({name: value for name, value in data.items() if name not in left_out})


def check(part: Settings, what: str, shipped: Iterable[str]) -> None:
    """Raise ValueError unless the class has an identity and the part a name that no shipped one has."""
    cls = type(part)
    params = cls.__dict__.get("__dataclass_params__")
    if params is None or not params.frozen:
        raise ValueError(f"{what} {cls.__name__}: write @dataclass(frozen=True) above the class")
    name = getattr(part, "name", None)
    if not isinstance(name, str) or not name:
        raise ValueError(
            f'{what} {cls.__name__}: it needs a name, which tables show; write: name: ClassVar[str] = "mine"'
        )
    if name in shipped:
        raise ValueError(f"{what} {cls.__name__}: {name!r} is the name of a shipped one; give it another")
    definition(cls)


def definition(cls: type) -> dict[str, str]:
    """What names the class in a config. Raises ValueError for a class without a clear identity."""
    root, file = _place(cls)
    return {"class": cls.__name__, "file": file, "sha256": Sources.of(root).digest(file, cls.__name__)}


def keep(parts: Iterable[Settings], folder: Path, grid_file: Path | None = None) -> Path | None:
    """Copy the sources of the parts' classes, and the grid's own file, into the grid's folder.

    Returns where they lie: a folder named by the hash of its contents. None where there are no parts.
    Raises: ValueError for two different files of one name.
    """
    files: dict[str, str] = {}
    for cls in {type(part): None for part in parts}:
        root, file = _place(cls)
        for name, text in Sources.of(root).files(file, cls.__name__).items():
            if files.setdefault(name, text) != text:
                raise ValueError(f"{cls.__name__}: its file {name} and another one of that name differ; rename one")
    if not files:
        return None
    if grid_file is not None:
        files.setdefault(grid_file.name, grid_file.read_text("utf-8"))
    kept = folder / FOLDER / _contents(files)
    for name, text in files.items():
        if not (kept / name).exists():
            record.write_atomically(kept / name, text.encode())
    return kept


def load(wanted: Mapping[str, str], sources: Path | None, what: str) -> type[Settings]:
    """The class of that definition, imported from a folder that `keep` made.

    Raises: ValueError where the folder does not hold that definition, or not what its name says.
    """
    name, file = wanted["class"], wanted["file"]
    if sources is None:
        raise ValueError(f"the {what} is the class {name} of {file}, not a shipped one; from_dict needs its sources")
    if _entered != sources.resolve():
        texts = {str(path.relative_to(sources)): path.read_text("utf-8") for path in sorted(sources.rglob("*.py"))}
        if _contents(texts) != sources.name:
            raise ValueError(f"{sources} does not hold what was written there; delete it and run the grid again")
        enter(sources)
    held = Sources.of(sources.resolve())
    if held.digest(file, name) != wanted["sha256"]:
        raise ValueError(f"{sources} holds another version of the {what} {name} of {file} than the config names")
    found = getattr(_module(sources.resolve() / file, file), name)
    assert issubclass(found, Settings)
    return found


# --- modules ---

_entered: Path | None = None
_before: set[str] = set()


def enter(folder: Path) -> None:
    """Let the modules of a folder be imported by name; forget those of the folder entered before, and their texts."""
    global _entered
    if _entered is not None:
        for name in sys.modules.keys() - _before:
            path = _path(sys.modules[name])
            mine = path is not None and path.is_relative_to(_entered) and name.partition(".")[0] not in SHIPPED
            if mine and _root(sys.modules[name]) == _entered:
                del sys.modules[name]
        if str(_entered) in sys.path:
            sys.path.remove(str(_entered))
    Sources.of.cache_clear()
    importlib.invalidate_caches()
    _entered = folder.resolve()
    _before.clear()
    _before.update(sys.modules)
    sys.path.insert(0, str(_entered))


def execute(path: Path, name: str) -> ModuleType:
    """The module that the file is, under that name."""
    spec = importlib.util.spec_from_file_location(name, path.resolve())
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where dataclasses look up the names in annotations
    spec.loader.exec_module(module)
    return module


def _module(path: Path, file: str) -> ModuleType:
    """The module of a file in the entered folder; one object, whoever imported it first."""
    for module in list(sys.modules.values()):
        if _path(module) == path:
            return module
    name = file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    if all(part.isidentifier() for part in name.split(".")) and name.partition(".")[0] not in sys.modules:
        module = importlib.import_module(name)
        if _path(module) == path:
            return module
    return execute(path, "own_" + name.replace(".", "_"))


def _path(module: object) -> Path | None:
    """The file of a module, None for one that has none."""
    file = getattr(module, "__dict__", {}).get("__file__")  # no getattr: a lazy module would load its parts
    return Path(file).resolve() if isinstance(file, str) else None


def _root(module: ModuleType) -> Path:
    """The folder from which the module's dotted name leads to its file."""
    path = _path(module)
    assert path is not None
    depth = module.__name__.count(".") + (path.name == "__init__.py")
    return path.parents[depth]


def _place(cls: type) -> tuple[Path, str]:
    """The folder and the file in it that define the class. Raises ValueError."""
    module = sys.modules.get(cls.__module__)
    who = f"the class {cls.__qualname__}"
    path = _path(module)
    if cls.__module__ == "__main__" or module is None or path is None:
        raise ValueError(f"{who} is defined in a script or a notebook, where a worker process cannot find it; {RIGHT}")
    if "." in cls.__qualname__:
        raise ValueError(f"{who} is defined inside a function or a class, where a worker cannot find it; {RIGHT}")
    if "site-packages" in path.parts:
        raise ValueError(f"{who} belongs to an installed package, whose source a run folder does not keep; {RIGHT}")
    root = _root(module)
    return root, path.relative_to(root).as_posix()


# --- sources ---


class Sources:
    """The Python files below a folder, each read once: what a class in them uses."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._texts: dict[str, str | None] = {}
        self._parsed: dict[str, list[ast.stmt]] = {}
        self._digests: dict[tuple[str, str], str] = {}

    @staticmethod
    @functools.cache
    def of(root: Path) -> "Sources":
        return Sources(root)

    def digest(self, file: str, name: str) -> str:
        """16 hex digits of the SHA-256 of the statements that the definition of `name` uses. Raises ValueError."""
        if (file, name) not in self._digests:
            used = self._used(file, name)
            if not used:
                raise ValueError(f"{file} does not define {name} at its top level; {RIGHT}")
            content = [[where, _plain(used[where, place])] for where, place in sorted(used)]
            self._digests[file, name] = hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]
        return self._digests[file, name]

    def files(self, file: str, name: str) -> dict[str, str]:
        """The texts of the file, of the modules below the folder that they import, and of the packages these lie in."""
        texts: dict[str, str] = {}
        todo = [file]
        while todo:
            file = todo.pop()
            text = self._text(file)
            if file in texts or text is None:
                continue
            texts[file] = text
            todo += [str(parent / "__init__.py") for parent in Path(file).parents if str(parent) != "."]
            for node in ast.walk(ast.parse(text)):
                todo += [found for found, _ in self._imports(node, file)]
        return texts

    def _used(self, file: str, name: str) -> dict[tuple[str, int], ast.stmt]:
        """The statements of all files by (file, place) that `name` needs; an import is cut to the names needed."""
        used: dict[tuple[str, int], ast.stmt] = {}
        seen: set[tuple[str, str | None]] = set()
        todo: list[tuple[str, str | None]] = [(file, name)]  # None: the whole module
        while todo:
            file, wanted = todo.pop()
            if (file, wanted) in seen:
                continue
            seen.add((file, wanted))
            for place, statement in enumerate(self._statements(file)):
                if wanted is not None and wanted not in _bound(statement):
                    continue
                if isinstance(statement, (ast.Import, ast.ImportFrom)):
                    aliases = [a for a in statement.names if wanted in (None, *_names_of(a))]
                    before = used.get((file, place))
                    if isinstance(before, (ast.Import, ast.ImportFrom)):
                        aliases = [a for a in statement.names if a in aliases or a in before.names]
                    statement = (
                        ast.Import(names=aliases)
                        if isinstance(statement, ast.Import)
                        else ast.ImportFrom(statement.module, aliases, statement.level)
                    )
                used[file, place] = statement
                for node in ast.walk(statement):
                    if isinstance(node, ast.Name):
                        todo.append((file, node.id))
                    todo += self._imports(node, file)
        return used

    def _imports(self, node: ast.AST, file: str) -> Iterator[tuple[str, str | None]]:
        """What an import statement takes from files below the folder: (file, name), or None for a whole module."""
        if isinstance(node, ast.Import):
            for alias in node.names:
                parts = alias.name.split(".")
                for end in range(1, len(parts) + 1):  # a.b runs a, too
                    if found := self._file(parts[:end]):
                        yield found, None
        elif isinstance(node, ast.ImportFrom):
            package = list(Path(file).parts[: -node.level]) if node.level else []
            parts = package + (node.module.split(".") if node.module else [])
            for alias in node.names:
                if inner := self._file([*parts, alias.name]):
                    yield inner, None
                elif found := self._file(parts):
                    yield found, None if alias.name == "*" else alias.name

    def _file(self, parts: list[str]) -> str | None:
        """The file of a module, by the parts of its name; None for one that lies elsewhere or is shipped."""
        if not parts or parts[0] in SHIPPED:
            return None
        stem = "/".join(parts)
        return next((file for file in (f"{stem}.py", f"{stem}/__init__.py") if self._text(file) is not None), None)

    def _text(self, file: str) -> str | None:
        if file not in self._texts:
            path = self._root / file
            self._texts[file] = path.read_text("utf-8") if path.is_file() else None
        return self._texts[file]

    def _statements(self, file: str) -> list[ast.stmt]:
        if file not in self._parsed:
            self._parsed[file] = _without_docstring(ast.parse(self._text(file) or "").body)
        return self._parsed[file]


def _contents(files: Mapping[str, str]) -> str:
    return hashlib.sha256(json.dumps(dict(sorted(files.items()))).encode()).hexdigest()[:16]


def _bound(statement: ast.AST) -> set[str]:
    """The names that a statement of a module binds or changes there."""
    if isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        return {statement.name}
    if isinstance(statement, ast.alias):
        return set(_names_of(statement))
    bound = {statement.id} if isinstance(statement, ast.Name) and isinstance(statement.ctx, ast.Store) else set()
    if isinstance(statement, (ast.Subscript, ast.Attribute)) and isinstance(statement.ctx, ast.Store):
        bound |= {node.id for node in ast.walk(statement.value) if isinstance(node, ast.Name)}
    return bound.union(*(_bound(child) for child in ast.iter_child_nodes(statement)))


def _names_of(alias: ast.alias) -> Iterator[str]:
    yield alias.asname or alias.name.partition(".")[0]


def _without_docstring(body: list[ast.stmt]) -> list[ast.stmt]:
    first = body[0] if body else None
    text = first.value if isinstance(first, ast.Expr) else None
    documented = isinstance(text, ast.Constant) and isinstance(text.value, str)
    return body[1:] if documented else body


def _plain(node: Any) -> Any:
    """A piece of syntax as JSON values, without places, docstrings and empty fields: the same in every Python."""
    if isinstance(node, ast.Constant):
        return repr(node.value)
    if isinstance(node, ast.AST):
        fields = dict(ast.iter_fields(node))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            fields["body"] = _without_docstring(node.body)
        skipped = ("ctx", "type_comment", "kind")
        kept = {
            name: _plain(value) for name, value in fields.items() if name not in skipped and value not in (None, [])
        }
        return [type(node).__name__, kept]
    return [_plain(item) for item in node] if isinstance(node, list) else str(node)
