"""The training corpus of tandem-tiny: the documentation that every Python installation carries.

Owns the extraction of documents from the standard library, their de-duplication and the held-out split.
Knows nothing of tokenizers or models. Reading the same Python release always gives the same documents.

1. `read_pages` collects one `Page` per stdlib module (by `ast`, nothing is imported), per `pydoc` topic, and per
   C module whose docstrings exist only at run time.
2. `split_of` puts a page into the training or held-out part by a hash of its name, so that all documents made from
   one source file stay on one side, for every Python release.
3. `build_corpus` turns pages into prose, code and chat documents. Training pages go first, and a docstring, paragraph
   or function that was seen before is dropped: nothing held out repeats a text of the training part.
"""

import ast
import hashlib
import importlib
import inspect
import json
import re
import sysconfig
import textwrap
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from pathlib import Path
from pydoc_data import topics

from tools.tiny_chat import conversations, small_talk

HELD_OUT_ONE_IN = 20
SKIPPED_FOLDERS = {"site-packages", "test", "tests", "idle_test", "encodings", "pydoc_data", "_bundled", "__pycache__"}
C_MODULES = """
    builtins math cmath itertools time sys gc marshal array zlib select binascii unicodedata posix _functools
    _operator _io _collections _datetime _random _json _socket _csv _bisect _heapq _struct _decimal _ssl _hashlib
    _pickle _thread _queue _weakref _signal _bz2 _lzma _sqlite3 _abc _asyncio _contextvars _statistics
""".split()  # noqa: SIM905
Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


class Kind(StrEnum):
    PROSE = "prose"
    CODE = "code"
    CHAT = "chat"


class Split(StrEnum):
    TRAIN = "train"
    HELD_OUT = "held_out"


@dataclass(frozen=True, slots=True)
class Entry:
    """One documented object. `signature` is empty for a module or a topic."""

    name: str
    signature: str
    doc: str

    @property
    def is_public(self) -> bool:
        return not any(part.startswith("_") and not part.startswith("__") for part in self.name.split("."))


@dataclass(frozen=True, slots=True)
class Page:
    """All that one source gives: the documented objects in order, and the source text of its definitions."""

    source: str
    entries: list[Entry]
    code: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Document:
    """One training document. `text` of a chat holds the role markers of the chat template."""

    source: str
    kind: Kind
    split: Split
    text: str


def stable_hash(text: str) -> int:
    """Pure. The same number on every machine and in every run, unlike `hash`."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest())


def split_of(source: str) -> Split:
    """Pure. One source in `HELD_OUT_ONE_IN` is held out."""
    return Split.HELD_OUT if stable_hash(source) % HELD_OUT_ONE_IN == 0 else Split.TRAIN


def build_corpus() -> list[Document]:
    """Reads the running interpreter's standard library and returns its documents, training part first."""
    pages = sorted(read_pages(), key=lambda page: (split_of(page.source) is Split.HELD_OUT, page.source))
    seen: set[int] = set()
    documents = [Document("small_talk", Kind.CHAT, Split.TRAIN, text) for text in small_talk()]
    return documents + [document for page in pages for document in documents_of(page, seen)]


def documents_of(page: Page, seen: set[int]) -> Iterator[Document]:
    """Yields the documents of one page, leaving out texts in `seen`, to which it adds the page's own."""
    split = split_of(page.source)
    entries = [Entry(e.name, e.signature, doc) for e in page.entries if (doc := _fresh_paragraphs(e.doc, seen))]
    for piece in _pieces_of_page(entries):
        yield Document(page.source, Kind.PROSE, split, piece)
    public = [entry for entry in entries if entry.is_public]
    for chat in conversations([(e.name, e.signature, e.doc) for e in public], choose=stable_hash):
        yield Document(page.source, Kind.CHAT, split, chat)
    for code in page.code:
        if _is_fresh(code, seen):
            yield Document(page.source, Kind.CODE, split, code)


def read_pages() -> Iterator[Page]:
    """Yields the pages of all three sources: Python files, `pydoc` topics, C modules."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if SKIPPED_FOLDERS.isdisjoint(relative.parts) and not relative.name.startswith("_sysconfigdata"):
            page = _page_of_file(relative, path)
            if page is not None:
                yield page
    for name, text in sorted(topics.topics.items()):
        yield Page(f"topic:{name}", [Entry(name, "", text)])
    for name in C_MODULES:
        try:
            module = importlib.import_module(name)
        except ImportError:  # not built on this platform: the corpus is smaller there, and its digest differs
            continue
        yield Page(f"c:{name}", list(_entries_of_c_module(module, name)))


def save_corpus(documents: list[Document], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(asdict(document)) + "\n" for document in documents))


def load_corpus(path: Path) -> list[Document]:
    """Returns the documents saved by `save_corpus`, or extracts and saves them if the file does not exist."""
    if not path.exists():
        save_corpus(build_corpus(), path)
    rows = (json.loads(line) for line in path.read_text().splitlines())
    return [Document(row["source"], Kind(row["kind"]), Split(row["split"]), row["text"]) for row in rows]


def digest_of(documents: list[Document]) -> str:
    """Pure. Names a corpus: equal digests mean equal texts, splits and order."""
    digest = hashlib.blake2b(digest_size=8)
    for document in documents:
        digest.update(f"{document.kind}\0{document.split}\0{document.text}\0".encode())
    return digest.hexdigest()


def _page_of_file(relative: Path, path: Path) -> Page | None:
    try:
        source = path.read_text(encoding="utf-8")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(source)
    except (SyntaxError, UnicodeDecodeError):  # lib2to3 and others keep sample files that are not Python 3
        return None
    parts = relative.with_suffix("").parts
    module = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
    module = "os.path" if module == "posixpath" else module
    entries = list(_entries_of(tree, module))
    doc = ast.get_docstring(tree)
    if doc:
        entries.insert(0, Entry(module, "", doc))
    code = [ast.get_source_segment(source, node) or "" for node in tree.body if isinstance(node, Definition)]
    return Page(relative.as_posix(), entries, [text for text in code if 160 <= len(text) <= 6000])


def _entries_of(owner: ast.Module | ast.ClassDef, prefix: str) -> Iterator[Entry]:
    for node in owner.body:
        if not isinstance(node, Definition):
            continue
        name, doc = f"{prefix}.{node.name}", ast.get_docstring(node)
        if doc:
            yield Entry(name, f"{node.name}({_arguments_of(node)})", doc)
        if isinstance(node, ast.ClassDef):
            yield from _entries_of(node, name)


def _arguments_of(node: Definition) -> str:
    """The arguments that a caller writes: without self or cls; those of `__init__` for a class."""
    if isinstance(node, ast.ClassDef):
        makers = [n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"]
        return _arguments_of(makers[0]) if makers else ""
    arguments = ast.unparse(node.args)
    receiver, _, rest = arguments.partition(", ")
    return rest.removeprefix("/, ") if receiver in ("self", "cls") else arguments


def _entries_of_c_module(module: object, name: str) -> Iterator[Entry]:
    shown = {"posix": "os"}.get(name, name.removeprefix("_"))
    doc = inspect.getdoc(module)
    if doc:
        yield Entry(shown, "", doc)
    for member, value in sorted(vars(module).items()):
        if member.startswith("_") or not callable(value) or getattr(value, "__module__", name) not in (name, shown):
            continue
        yield from _entry_of_object(value, member if shown == "builtins" else f"{shown}.{member}")
        if inspect.isclass(value) and not issubclass(value, BaseException):
            for method, function in sorted(vars(value).items()):
                if inspect.ismethoddescriptor(function):
                    yield from _entry_of_object(function, f"{shown}.{member}.{method}".removeprefix("builtins."))


def _entry_of_object(value: object, name: str) -> Iterator[Entry]:
    doc = getattr(value, "__doc__", None)
    if isinstance(doc, str) and len(doc) > 40:
        arguments = str(getattr(value, "__text_signature__", None) or "(...)").replace("$", "").replace(", /", "")
        for receiver in ("module", "self", "type"):
            arguments = arguments.replace(f"({receiver}, ", "(").replace(f"({receiver})", "()")
        yield Entry(name, name.rpartition(".")[2] + arguments, inspect.cleandoc(doc))


def _pieces_of_page(entries: list[Entry]) -> Iterator[str]:
    """A page as Markdown, cut between entries into documents of some 8,000 characters."""
    piece = ""
    for entry in entries:
        title = f"## {entry.name}\n\n    {entry.signature}\n\n" if entry.signature else f"# {entry.name}\n\n"
        piece += title + entry.doc + "\n\n"
        if len(piece) > 8000:
            yield piece.strip()
            piece = ""
    if piece:
        yield piece.strip()


def _fresh_paragraphs(doc: str, seen: set[int]) -> str:
    """Drops repeated paragraphs: topics quote each other, and stdlib classes inherit whole docstrings."""
    paragraphs = re.split(r"\n\s*\n", textwrap.dedent(doc).strip().expandtabs())
    fresh = [text for text in paragraphs if len(text) < 40 or _is_fresh(text, seen)]
    return "\n\n".join(fresh) if sum(map(len, fresh)) >= 20 else ""


def _is_fresh(text: str, seen: set[int]) -> bool:
    key = stable_hash(" ".join(text.lower().split()))
    is_fresh = key not in seen
    seen.add(key)
    return is_fresh
