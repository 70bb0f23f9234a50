"""Settings: turn one dataclass, config files and a command line into one checked object.

    python train.py config/tiny.py --n_layer 2 --learning_rate=3e-4 --wandb

A setting is one line of a dataclass: name, type, default, and a comment, which `--help` prints. A
config file holds plain assignments (`n_layer = 2`); it is read, never executed. Later words win
over earlier ones, and the command line wins over files.

Also here, as every script needs it: `UserError`, `run`, `atomic_write`, `lock`, and the environment
variables that have to be set before torch is imported.
"""

import ast
import contextlib
import dataclasses
import difflib
import errno
import inspect
import os
import re
import sys
import typing
from pathlib import Path

# Open /dev/null in place of closed standard streams: otherwise the next file opened gets their
# number and receives what is printed.
while (descriptor := os.open(os.devnull, os.O_RDWR)) < 3:
    pass
os.close(descriptor)

# Large tensors in huge pages: otherwise every update on a CPU maps them again, 4 KiB at a time.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
# OpenMP's threads wait for each other in a loop; a short one leaves the cores to other programs.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

# What `ast` raises for text that is not Python: wrong, not UTF-8, nested too deeply, ...
NOT_PYTHON = (SyntaxError, ValueError, TypeError, RecursionError, MemoryError)

# Names that are not settings here, and what to use instead; most are nanoGPT's.
OTHER_NAMES = {
    "plan": "the first lines of every run say what it takes",
    "recompute": "use --activation_checkpointing",
    "block_size": "use --context_length",
    "gradient_accumulation_steps": "use --batch_size (all of an update), --micro_batch_size",
    "lr": "use --learning_rate",
    "lr_decay_iters": "use --max_iters",
    "decay_lr": "use --lr_schedule",
    "eval_only": "use sample.py --score",
    "always_save_checkpoint": "use --checkpoint_interval",
    "backend": "the device decides it",
}


class UserError(ValueError):
    """An error the user can fix: `run` prints it as one line and exits with code 2."""


@contextlib.contextmanager
def user_errors():
    """Turn ValueError and OSError into UserError."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise UserError(error) from error


def run(main):
    """Call `main(argv)` for a script; print errors that the user can fix as one line."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # not None (closed) nor a notebook's
            stream.reconfigure(errors="replace")  # for characters that the terminal cannot show
    try:
        try:
            return main(sys.argv[1:])
        finally:
            print(end="", flush=True)  # fails here, not at Python's exit
    except UserError as error:
        stop(error, 2)
    except (MemoryError, RuntimeError) as error:
        if "allocate" not in str(error) and not isinstance(error, MemoryError):
            raise
        stop("out of memory; training takes less with a smaller batch, context or model", 2)
    except OSError as error:
        if error.filename is not None:
            raise
        sys.stdout = open(os.devnull, "w")
        if isinstance(error.__context__, UserError):  # the reason why `main` ended
            stop(error.__context__, 2)
        if not isinstance(error, BrokenPipeError):  # `| head` has closed standard output
            stop(f"cannot write to standard output: {error.strerror}", 2)


def stop(message, code: int):
    """Print `message` as one line on standard error and exit with `code`."""
    with contextlib.suppress(OSError):  # standard error may be closed
        print(f"{sys.argv[0]}: {' '.join(str(message).split())}", file=sys.stderr, flush=True)
    sys.exit(code)


def excepthook(kind, error, traceback):
    """Report Ctrl-C as one line, also while torch is imported; other errors as Python does."""
    if issubclass(kind, KeyboardInterrupt):
        stop("stopped", 130)  # 128 + SIGINT, as shells report it
    sys.__excepthook__(kind, error, traceback)


sys.excepthook = excepthook


def parse(cls, argv: list[str]):
    """Return an instance of the dataclass `cls`; its attribute `given` has the settings given.

    Words without `--` are config files, or the values of the field `sources` if `cls` has one.
    Raises UserError for an unknown name, a value of the wrong type, or one that `cls` refuses.
    """
    types = typing.get_type_hints(cls)
    types = {field.name: types[field.name] for field in dataclasses.fields(cls)}
    words, plain, from_files, given = list(argv), [], {}, {}
    while words:
        word = words.pop(0)
        if not word.startswith("--") and word != "-h":
            plain.append(word)
            if "sources" not in types:
                from_files |= read_file(word, types)
            continue
        if word in ("-h", "--help"):
            print(describe(cls, types, from_files))
            sys.exit(0)
        name, equals, text = word[2:].partition("=")
        positive = name.removeprefix("no-")
        if not equals and name not in types and bool in alternatives(types.get(positive)):
            name, equals, text = positive, "=", "false"
        check_name(name, types.keys() - {"sources"})
        if not equals and bool in alternatives(types[name]):
            text = words.pop(0) if words and words[0].lower() in ("true", "false") else "true"
        elif not equals:
            if not words or words[0].startswith("--"):
                raise UserError(f"--{name} needs a value (--{name}=VALUE if it begins with --)")
            text = words.pop(0)
        given[name] = check_type(f"--{name}", to_value(text, types[name]), types[name])
    given = from_files | given
    with user_errors():
        config = cls(**given, **({"sources": plain} if "sources" in types else {}))
    config.given = given
    return config


def read_file(path: str, types: dict) -> dict:
    """Return the assignments in a config file, checked against `types`."""
    try:
        body = ast.parse(Path(path).read_text(encoding="utf-8-sig"), path).body  # -sig: skip a BOM
    except OSError as error:
        advice = f'; did you mean --start "{path}"?' if "start" in types else ""
        raise UserError(f"cannot read config file {path}: {error.strerror}{advice}") from error
    except NOT_PYTHON as error:
        advice = f"; to continue it, --start FILE:{path}" if "start" in types else ""
        raise UserError(f"{path} is not a config file: {error}{advice}") from error
    values = {}
    for node in body:
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            continue  # a docstring
        where = f"{path}, line {node.lineno}: "
        try:
            [target] = node.targets
            name, value = target.id, ast.literal_eval(node.value)
        except (AttributeError, *NOT_PYTHON) as error:
            raise UserError(f"{where}only `name = plain value` may stand here") from error
        check_name(name, types, where)
        values[name] = check_type(where + name, value, types[name])
    return values


def check_name(name: str, types: dict, where: str = ""):
    """Raise UserError, with the nearest name, unless `name` is a setting."""
    if name in types:
        return
    near = difflib.get_close_matches(name.replace("-", "_"), types, n=1, cutoff=0.5)
    advice = f"did you mean {near[0]}?" if near else "--help lists them all"
    raise UserError(f"{where}there is no setting {name!r}; {OTHER_NAMES.get(name, advice)}")


def alternatives(type_) -> tuple:
    """Return what a type admits: (int, NoneType) of `int | None`, ("a", "b") of a Literal."""
    return typing.get_args(type_) or (type_,)


def type_name(type_) -> str:
    """Return a type in words, such as `int or none`."""
    names = (getattr(each, "__name__", str(each)) for each in alternatives(type_))
    return " or ".join(names).replace("NoneType", "none")


def to_value(text: str, type_):
    """Return a word of the command line as Python reads it, or unchanged if `type_` is text."""
    if str in alternatives(type_) or isinstance(alternatives(type_)[0], str):
        return text
    try:
        return ast.literal_eval(text.capitalize() if text[:1].isalpha() else text.strip())
    except NOT_PYTHON:
        return text  # `check_type` refuses it


def check_type(name: str, value, type_):
    """Return `value` if it is of type `type_`; an int may stand for a float."""
    if float in alternatives(type_) and type(value) is int and abs(value) < 1e300:
        value = float(value)
    if type(value) is int and abs(value) >= 2**63:
        raise UserError(f"{name} is {str(value)[:20]}...; it is too large")
    if type(value) in alternatives(type_) or value in alternatives(type_):
        return value
    raise UserError(f"{name} is {value!r}; it must be {type_name(type_)}")


def check_ranges(settings, ranges: dict[str, str]):
    """Raise ValueError unless the settings lie in their ranges; None lies in all of them.

    `ranges` has an interval, such as "[0, 1)", and the names of the settings that it bounds.
    """
    for interval, names in ranges.items():
        low, high = map(float, interval[1:-1].split(", "))
        for name in names.split():
            value = getattr(settings, name)
            ends = (value == low and "[" in interval) or (value == high and "]" in interval)
            if value is not None and not (ends or low < value < high):
                raise ValueError(f"{name} is {value}; it must be in {interval}")


def describe(cls, types: dict, given: dict) -> str:
    """Return the --help text: the script's docstring, then every setting of `cls`.

    Meanings are the comments in the source; a comment on a line of its own is a heading.
    """
    rows = {}
    for base in reversed(cls.__mro__[:-1]):
        for heading, name, meaning in re.findall(
            r"^    (# .*)|^    (\w+): .*?  # (.*)", inspect.getsource(base), re.MULTILINE
        ):
            rows[heading or name] = heading or meaning
    defaults = {field.name: field.default for field in dataclasses.fields(cls)} | given
    lines = [inspect.getmodule(cls).__doc__ or ""]
    for name, meaning in rows.items():
        if name not in types:
            lines.append("\n" + meaning.lstrip("# "))
        elif name != "sources":
            kind = f", --no-{name}" if types[name] is bool else f" {type_name(types[name])}"
            setting = f"--{name}{kind}"
            lines.append(f"  {setting:<34} {meaning} [{defaults[name]}]")
    return "\n".join(lines)


@contextlib.contextmanager
def atomic_write(path):
    """Open a binary file that replaces `path` once it is complete and flushed to disk.

    Until then, and after any error, `path` is unchanged.
    """
    path = Path(path)
    beside = path.with_name(path.name + ".tmp")
    try:
        with open(beside, "w+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
    with contextlib.suppress(OSError):  # the new name, too; some file systems refuse it
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


@contextlib.contextmanager
def lock(folder):
    """Hold FOLDER.lock while the block runs; raise UserError if another process holds it.

    The system releases the lock when the process ends, in whatever way. Without support for locks,
    as on some network file systems, nothing is checked.
    """
    folder = Path(os.path.realpath(folder))  # one lock for all links to a folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        try:
            file = stack.enter_context(open(f"{folder}.lock", "ab"))
            if os.name == "nt":
                import msvcrt

                msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
            else:
                import fcntl

                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN) and error.filename is None:  # not open's
                reason = "another process is writing there; wait for it, or use another folder"
                raise UserError(f"{folder}: {reason}") from error
        yield
