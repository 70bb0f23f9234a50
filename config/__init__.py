"""Settings: one dataclass, config files and a command line into one checked object.

    python train.py config/tiny.py --n_layer 2 --learning_rate=3e-4 --wandb

A setting is one line of a dataclass: name, type, default and a comment. The comment is what
`--help` prints. A config file holds plain assignments (`n_layer = 2`) and is read, never executed.
Later words win over earlier ones, and the command line wins over files.
"""

import ast
import contextlib
import dataclasses
import difflib
import inspect
import os
import re
import sys
import typing


class UserError(ValueError):
    """Something the person at the keyboard can mend; `run` shows it as one line, exit code 2."""


@contextlib.contextmanager
def user_errors():
    """Around code that knows of no keyboard: what it refuses is the user's to mend."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise UserError(error) from error


def run(main):
    """Call `main(argv)` for a script; a UserError ends in one line, Ctrl-C without a traceback."""
    for stream in filter(None, (sys.stdout, sys.stderr)):  # one that is closed is None
        stream.reconfigure(errors="replace")  # a terminal that lacks a character gets another
    try:
        main(sys.argv[1:])
    except UserError as error:
        print(f"{sys.argv[0]}: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except (MemoryError, RuntimeError) as error:
        if "allocate" not in str(error) and not isinstance(error, MemoryError):
            raise
        said = f"{sys.argv[0]}: out of memory: a smaller batch, context or model takes less"
        print(said, file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:  # whoever read has seen enough (`| head`)
        sys.stdout = open(os.devnull, "w")
    except KeyboardInterrupt:
        with contextlib.suppress(OSError):  # nobody may be there to read it
            print(f"\n{sys.argv[0]}: stopped", file=sys.stderr, flush=True)
        sys.exit(130)  # 128 + SIGINT, as shells report it


def parse(cls, argv):
    """One instance of the dataclass `cls` from the words of a command line.

    Words without `--` are config files, or the values of the field `sources` where `cls` has one.
    Raises UserError for an unknown name, a value of the wrong type, or one that `cls` refuses.
    """
    hints = typing.get_type_hints(cls)
    words, plain, values, given = list(argv), [], {}, {}
    while words:
        word = words.pop(0)
        if word in ("-h", "--help"):
            print(describe(cls, hints))
            sys.exit(0)
        if not word.startswith("--"):
            plain.append(word)
            continue
        name, equals, text = word[2:].partition("=")
        check_name(name, hints)
        if not equals and bool in options(hints[name]):
            text = words.pop(0) if words and words[0].lower() in ("true", "false") else "true"
        elif not equals:
            if not words or words[0].startswith("--"):
                raise UserError(f"--{name} needs a value (--{name}=VALUE if it begins with --)")
            text = words.pop(0)
        given[name] = check_type(f"--{name}", from_text(text, hints[name]), hints[name])
    if "sources" in hints:
        values["sources"] = plain
    else:
        for path in plain:
            values |= read_file(path, hints)
    with user_errors():
        return cls(**values | given)


def read_file(path, hints):
    """The assignments of one config file, checked against the types in `hints`."""
    try:
        with open(path, encoding="utf-8-sig") as file:  # editors on Windows put a mark in front
            body = ast.parse(file.read()).body
    except OSError as error:
        raise UserError(f"cannot read config file {path}: {error.strerror}") from error
    except SyntaxError as error:
        raise UserError(f"{path}, line {error.lineno}: {error.msg}") from error
    except (ValueError, RecursionError, MemoryError) as error:  # not text, NUL bytes, absurd depth
        raise UserError(f"{path} is not a config file: {error}") from error
    values = {}
    for node in body:
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            continue  # a docstring
        where = f"{path}, line {node.lineno}: "
        try:
            [target] = node.targets
            name, value = target.id, ast.literal_eval(node.value)
        except (AttributeError, ValueError, TypeError, RecursionError, MemoryError) as error:
            raise UserError(f"{where}only `name = plain value` may stand here") from error
        check_name(name, hints, where)
        values[name] = check_type(where + name, value, hints[name])
    return values


def check_name(name, hints, where=""):
    """Raise UserError, with the nearest real name, unless `name` is a setting."""
    if name not in hints:
        near = difflib.get_close_matches(name.replace("-", "_"), hints, n=1, cutoff=0.5)
        advice = f"did you mean {near[0]}?" if near else "--help lists them all"
        raise UserError(f"{where}there is no setting {name!r}; {advice}")


def options(hint):
    """What a type admits: `int | None` (int, NoneType), `Literal["a", "b"]` ("a", "b")."""
    return typing.get_args(hint) or (hint,)


def name_type(hint):
    """A type in a reader's words: `int or none`."""
    names = (getattr(option, "__name__", str(option)) for option in options(hint))
    return " or ".join(names).replace("NoneType", "none")


def from_text(text, hint):
    """A word of a command line as a value: text where `hint` is text, else as Python reads it."""
    if str in options(hint) or isinstance(options(hint)[0], str):
        return text
    try:
        return ast.literal_eval(text.capitalize() if text[:1].isalpha() else text.strip())
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
        return text  # which `check_type` refuses


def check_type(name, value, hint):
    """`value` if it is one of the `options` of `hint` (an int may stand for a float)."""
    if float in options(hint) and type(value) is int and abs(value) < 1e300:
        value = float(value)
    if type(value) is int and abs(value) >= 2**63:
        raise UserError(f"{name} is {str(value)[:20]}...; it is too large")
    if type(value) in options(hint) or value in options(hint):
        return value
    raise UserError(f"{name} is {value!r}; it must be {name_type(hint)}")


def describe(cls, hints):
    """The --help text: what the script says of itself, then every setting of `cls`.

    Meanings are the comments in the source, where a comment on a line of its own is a heading.
    """
    rows = {}
    for base in reversed(cls.__mro__[:-1]):
        source = inspect.getsource(base)
        for heading, name, meaning in re.findall(
            r"^    (# .*)|^    (\w+): .*?  # (.*)", source, re.MULTILINE
        ):
            rows[heading or name] = heading or meaning
    defaults = {field.name: field.default for field in dataclasses.fields(cls)}
    lines = [inspect.getmodule(cls).__doc__ or ""]
    for name, meaning in rows.items():
        if name not in hints:
            lines.append("\n" + meaning.lstrip("# "))
        elif name != "sources":
            setting = f"--{name} {'' if hints[name] is bool else name_type(hints[name])}"
            lines.append(f"  {setting:<34} {meaning} [{defaults[name]}]")
    return "\n".join(lines)
