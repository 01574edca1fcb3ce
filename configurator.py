"""Settings: default < config files left to right < environment variable KEY < --key=value or --key value.

The keys of a script are the plain assignments at its top, those of a model its dataclass fields; neither is written twice:

    max_iters = 1000  # [1, 1e9] optimizer steps   <- key, default, type (int), allowed values and help text

    with one_line_errors():
        cfg = configure(globals(), ModelConfig, choices={"mixer": TIME_MIXERS})
        main(cfg.pick(ModelConfig), max_iters)     # the resolved value is back in the plain name

Whatever a user types gets the type of the default, is checked, and is named in the error. Config files are never executed.
"""
import ast
import contextlib
import dataclasses
import difflib
import glob
import inspect
import io
import os
import re
import signal
import sys
import threading
import tokenize
from fnmatch import fnmatchcase
from types import SimpleNamespace
from typing import NamedTuple

BOOLS = dict.fromkeys(("1", "true", "yes", "on"), True) | dict.fromkeys(("0", "false", "no", "off"), False)
EXPECTED = {  # the types a key can have -> what to tell a user who gave something else
    bool: "one of " + " ".join(BOOLS), int: "a whole number such as 12 or 1_000", float: "a number such as 0.1 or 3e-4",
    str: "text in quotes", tuple: "values such as 1,2 or (1, 2)", list: "values such as 1,2 or [1, 2]"}
FAMILIES = ("*_TASK", "*_EVAL", "DW_JRT*", "WKV_*")  # environment names that can only be meant for us ...
FOREIGN = ("*_PER_TASK",)  # ... but SLURM_CPUS_PER_TASK and its kin belong to the cluster
PATHS = ("*path", "*_dir", "*_file", "*_bin", "ckpt", "out", "latent", "init_from", "rwkv_lm")  # in these ~ is the home folder
LARGEST = 2**63 - 1  # no whole number above it fits a tensor


class UserError(ValueError):
    """Base of what a user can cause; the message is one line naming the value, what is allowed, and the repair."""

class SettingError(UserError):
    """A setting that is unknown, mistyped or outside its choices."""

class Interval(NamedTuple):
    """The numbers that a key may have: `[1, 10]` with both ends, `(0, 1)` without; the first words of its comment."""
    open_low: bool
    low: float
    high: float
    open_high: bool

    @classmethod
    def of(cls, comment):
        """The interval that a comment begins with, or None."""
        if found := re.match(r"([\[(])([-+.\w]+), ([-+.\w]+)([\])])", comment):
            return cls(found[1] == "(", float(found[2]), float(found[3]), found[4] == ")")

    def __contains__(self, x):
        low = self.low < x or self.low == x and not self.open_low
        return low and (x < self.high or x == self.high and not self.open_high)

    def __str__(self):
        return f"{'[('[self.open_low]}{self.low:g}, {self.high:g}{'])'[self.open_high]}"


class Key(NamedTuple):
    """What is known of a key."""
    default: object
    interval: object = None  # Interval or None
    names: object = None  # list of allowed values or None


class Settings(SimpleNamespace):
    """Each key is an attribute; `sources[key]` is "default", "default with X", "file F", "env KEY" or "command line".
    `keys[key]` is its Key."""

    def given(self, key):
        """True if the user set the key, be it to its default. KeyError if there is no such key."""
        return not self.sources[key].startswith("default")

    def default(self, key, value, why):
        """For `adjust`: another default for `key`, because of the setting `why`. A value that the user gave stays."""
        if not self.given(key) and getattr(self, key) != value:
            setattr(self, key, value)
            self.sources[key] = f"default with {why}"

    def adopt(self, values, keep, why):
        """For `adjust`: the defaults are those of an earlier run, a dict that may hold keys of another version, but for
        the keys to `keep`. SettingError for a value that the key cannot have."""
        for key in values.keys() & self.keys.keys() - set(keep):
            self.default(key, checked(key, values[key], self.keys[key], why), why)

    def pick(self, cls, **more):
        """An instance of the dataclass `cls`, from those of its fields that are keys; `more` overrides."""
        mine = {f.name: getattr(self, f.name) for f in dataclasses.fields(cls) if f.init and f.name in self.sources}
        return cls(**(mine | more))

    def as_dict(self):
        """All keys and values as JSON has them."""
        values = {key: getattr(self, key) for key in self.sources}
        return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}

    def lines(self, sources=("",)):
        """A line such as `dw_jrt = True   (env DW_JRT)` for each key that is not at its plain default, of these sources."""
        return [f"{key} = {getattr(self, key)!r}   ({source})" for key, source in self.sources.items()
                if source != "default" and source.startswith(sources)]

def configure(*groups, choices={}, families=FAMILIES, argv=None, env=None, prefix="", adjust=None, show=True):
    """Resolve every key of `groups` -> Settings.

    groups     a script's globals() (its resolved values are written back), a dataclass type, or a dict name -> (default,
               comment). In a script or a dataclass, a _name or a default that is not a literal of EXPECTED is no key.
    choices    key -> iterable of allowed names, such as a table; the default is allowed as well
    families   patterns of environment names that must resolve to a key
    argv, env  the command line without the script's name, and the environment; None: those of this process
    prefix     of the names in the environment, but for those of `families`: plain words are other programs', too
    show       print every key that is not at its default; False: only what was taken from the environment
    adjust     called with the Settings before they are printed, for defaults that depend on others: `cfg.default(...)`
    Errors: SettingError for what a user can cause, AssertionError for what only the programmer can. --help exits with 0.
    """
    argv, env = sys.argv[1:] if argv is None else argv, os.environ if env is None else env
    choices = {key: list(names) for key, names in choices.items()}
    sections = [section(group) for group in groups]
    keys = merge(sections, choices)
    if "-h" in argv or "--help" in argv:
        print(help_text(groups, sections, choices, prefix))
        raise SystemExit(0)

    cfg = Settings(**{key: row.default for key, row in keys.items()}, sources=dict.fromkeys(keys, "default"), keys=keys)
    files, options = split_argv(argv, keys)
    given = [(key, value, f"file {path}") for path in files for key, value in read_config(path, keys)]
    given += [(key, text, f"env {name}") for key, name, text in read_environment(env, keys, families, prefix)]
    given += [(key, text, "command line") for key, text in options]
    for key, value, source in given:  # in order of precedence: the last one stays
        setattr(cfg, key, checked(key, value, keys[key], source))
        cfg.sources[key] = source
    if adjust:
        adjust(cfg)
    for group, (_, mine) in zip(groups, sections):
        if is_script(group):
            group.update({key: getattr(cfg, key) for key in mine})
    for line in cfg.lines(("",) if show else ("env ",)):
        print(line)
    return cfg

# ---- where keys are defined ------------------------------------------------------------------------------------------

def is_script(group):
    return isinstance(group, dict) and "__file__" in group

def section(group):
    """A group -> (title, {key: (default, comment)})."""
    if is_script(group):
        title, found = os.path.basename(group["__file__"]), {}
        with tokenize.open(group["__file__"]) as file:
            source = file.read()
        for node, comment in commented(source, ast.parse(source).body):
            calls = [ast.unparse(n.func) for n in ast.walk(node) if isinstance(n, ast.Call)]
            if "configure" in calls or "configurator.configure" in calls:
                break  # what is below the call is code, not settings
            if pair := assigned(node):
                found[pair[0]] = (pair[1], comment)
    elif dataclasses.is_dataclass(group):
        title, notes = f"{group.__module__}.{group.__qualname__}", {}
        for base in reversed(group.__mro__):  # the comment of an inherited field stands in its base
            with contextlib.suppress(OSError, TypeError, SyntaxError):  # no source (typed at a prompt): no help text
                source = inspect.getsource(base)
                notes |= {getattr(n.target, "id", ""): comment for n, comment in commented(source, ast.parse(source).body[0].body)
                          if isinstance(n, ast.AnnAssign)}
        found = {f.name: (f.default, notes.get(f.name, "")) for f in dataclasses.fields(group) if f.init}
    else:
        return "further keys", group
    return title, {key: row for key, row in found.items() if key[0] != "_" and type(row[0]) in EXPECTED}

def commented(source, nodes):
    """Each statement with its trailing comment."""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    comments = {t.start[0]: t.string.lstrip("# ") for t in tokens if t.type == tokenize.COMMENT}
    return [(node, comments.get(node.end_lineno, "")) for node in nodes]

def assigned(node):
    """The statement `name = literal` -> (name, value), any other -> None."""
    if isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
        with contextlib.suppress(ValueError, TypeError):  # what literal_eval raises for an expression
            return node.targets[0].id, ast.literal_eval(node.value)

def merge(sections, choices):
    """key -> Key of all sections. A key may stand in two of them only if it means the same in both."""
    found = {}
    for title, keys in sections:
        for key, (default, comment) in keys.items():
            row = found.setdefault(key, Key(default, Interval.of(comment), choices.get(key)))
            if repr(row.default) != repr(default):
                raise AssertionError(f"{title}: key {key!r} has default {default!r} here and {row.default!r} elsewhere")
            if type(default) not in EXPECTED or key in ("sources", "keys") or hasattr(Settings, key):
                raise AssertionError(f"{title}: key {key!r} needs a default of bool, int, float, str, tuple or list, "
                                     "and a name that is not a member of Settings")
    if unknown_keys := choices.keys() - found.keys():
        raise AssertionError(f"choices for {sorted(unknown_keys)}, which are keys of no group")
    return found

# ---- what users give -------------------------------------------------------------------------------------------------

def read_config(path, keys):
    """The (key, value) pairs of a config file: comments, a docstring, and lines `name = literal`."""
    allowed = "a config file holds only comments and lines `name = literal`"
    try:
        with open(os.path.expanduser(path), "rb") as file:  # bytes, so that ast reports a wrong encoding too
            tree = ast.parse(file.read())
            lines = list(tree.body[ast.get_docstring(tree) is not None:])
            pairs = [assigned(node) for node in lines]
    except OSError as error:
        near = nearest(path, glob.glob("config/*.py"))
        raise SettingError(f"config file {path!r}: {error.strerror}" + (f"; did you mean {near!r}?" if near else "")) from None
    except (SyntaxError, ValueError) as error:  # ValueError: a null byte, before Python 3.12
        where = getattr(error, "lineno", None) or 1
        raise SettingError(f"{path}:{where}: {getattr(error, 'msg', error)}: {allowed}") from None
    except (RecursionError, MemoryError):  # what Python's parser says to 20,000 minus signs
        raise SettingError(f"{path}: an expression in it is nested too deeply: {allowed}") from None
    for node, pair in zip(lines, pairs):
        if not pair:
            raise SettingError(f"{path}:{node.lineno}: {ast.unparse(node).splitlines()[0]!r}: {allowed}")
        if pair[0] not in keys:
            raise unknown(pair[0], f"file {path}", keys)
        yield pair

def read_environment(env, keys, families, prefix=""):
    """The (key, name, text) of the environment. A stray name of an owned family is an error, another near miss a
    warning."""
    owned = lambda name: any(fnmatchcase(name, family) for family in families)
    names = {key.upper() if owned(key.upper()) else prefix + key.upper(): key for key in keys}
    for name, text in env.items():
        key = names.get(name)
        if text == "" and not (key and isinstance(keys[key].default, str)):
            continue  # `X_TASK= python ...` is how a shell unsets a variable for one command
        if key:
            yield key, name, text
        elif owned(name) and not any(fnmatchcase(name, other) for other in FOREIGN):
            raise unknown(name, "environment", names, repair="unset it, or see --help for all keys")
        elif name.isupper() and (near := nearest(name, names, cutoff=0.85)):
            print(f"warning: environment variable {name} has no effect; did you mean {near}?", file=sys.stderr)

def split_argv(argv, keys):
    """A command line -> ([config file], [(key, text)])."""
    files, options, rest = [], [], list(argv)
    while rest:
        word = rest.pop(0)
        name, equals, text = word[2:].partition("=")  # the first = only: a value may hold more
        key = name.replace("-", "_")
        alone = not rest or re.match("--[A-Za-z]", rest[0])  # one dash may begin a value: --lr -1
        if not word.startswith("--"):
            if not word.endswith(".py"):
                raise SettingError(f"unexpected argument {word!r}: a config file ends in .py, a setting is --key=value")
            files.append(word)
            continue
        if key not in keys:
            raise unknown(name, "command line", keys)
        default = keys[key].default
        if not equals and isinstance(default, bool) and (alone or rest[0].endswith(".py")):
            text = "true"
        elif not equals and alone and isinstance(default, str) and default:  # as in `sample.py --ckpt`
            text = default
        elif not equals and alone:
            raise SettingError(f"--{name} has no value: write --{name}=VALUE or --{name} VALUE")
        elif not equals:
            text = rest.pop(0)
        options.append((key, text))
    return files, options

def convert(value, like):
    """Text, or a literal of a config file, -> the type of `like`; else ValueError, TypeError, KeyError or SyntaxError."""
    if isinstance(like, (tuple, list)):
        try:
            items = ast.literal_eval(value) if isinstance(value, str) else value
        except (ValueError, SyntaxError):  # a,b: names without quotes
            items = [item.strip() for item in value.split(",") if item.strip()]
        items = items if isinstance(items, (tuple, list)) else [items]
        if len({type(item) for item in like}) == 1:  # all of one type in the default: so here
            items = [convert(str(item), like[0]) for item in items]
        return type(like)(items)
    if isinstance(like, str) and not isinstance(value, str):
        raise TypeError
    # By way of text, because int("1.5") and int("True") raise where int(1.5) and int(True) do not.
    value = BOOLS[str(value).lower()] if isinstance(like, bool) else type(like)(str(value))
    if value != value:
        raise ValueError("nan")
    return value

def checked(key, value, row, source):
    """`value` with the type of the default of `row`, a Key, in its interval and among its names; else SettingError."""
    like = row.default
    try:
        result = convert(value, like)
    except (ValueError, TypeError, KeyError, SyntaxError, RecursionError, MemoryError):
        raise SettingError(f"{key} = {short(value)} ({source}): expected {EXPECTED[type(like)]}; the default is {like!r}") from None
    if isinstance(result, (tuple, list)) and row.interval and not result:
        result = like
    if isinstance(result, str):
        if "\0" in result:
            raise SettingError(f"{key} = {short(value)} ({source}): holds a null character, leave it out")
        if any(fnmatchcase(key, pattern) for pattern in PATHS):
            result = os.path.expanduser(result)
    for part in result if isinstance(result, (tuple, list)) else [result]:
        number = isinstance(part, (int, float)) and not isinstance(part, bool)
        if number and row.interval and part not in row.interval:
            raise SettingError(f"{key} = {short(part)} ({source}): must be in {row.interval}; the default is {like!r}")
        if number and isinstance(part, int) and abs(part) > LARGEST:
            raise SettingError(f"{key} = {short(part)} ({source}): is too large, give at most 2^63 - 1")
        if row.names is not None and part not in row.names and result != like:
            near = nearest(part, row.names)
            raise SettingError(f"{key} = {short(part)} ({source}): must be one of {', '.join(map(str, row.names))}"
                               + (f"; did you mean {near!r}?" if near else ""))
    return result

def short(value):
    """repr(value), cut to what fits a line."""
    if isinstance(value, int) and value.bit_length() > 200:
        return f"a number of {int(value.bit_length() * 0.30103) + 1} digits"
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:70]}... ({len(text)} characters)"

def nearest(name, names, cutoff=0.6):
    """The one of `names` most like `name`, or None."""
    lower = {str(n).lower().replace("-", "_"): n for n in names}
    name = str(name)[:80].lower().replace("-", "_")
    return next((lower[n] for n in difflib.get_close_matches(name, lower, 1, cutoff)), None)

def unknown(name, source, names, repair="--help lists all keys"):
    near = nearest(name, names)
    return SettingError(f"unknown key {short(name)} ({source}): " + (f"did you mean {near!r}? " if near else "") + repair)

# ---- files: whatever one holds is read or refused in one line; they are written whole or not at all ----------------------

@contextlib.contextmanager
def reading(path, repair):
    """Around a reader of a file, which may be damaged or foreign: whatever the reader raises becomes a ValueError in one
    line, with the path and the repair. A UserError, or a ValueError that names the path already, stays as it is."""
    try:
        yield
    except Exception as error:
        if isinstance(error, UserError) or str(path) in str(error) and isinstance(error, (ValueError, OSError)):
            raise
        if isinstance(error, OSError) and error.strerror:
            raise UserError(f"{path}: {error.strerror}") from None
        said = " ".join(str(error).split()) or "no more is known"
        raise UserError(f"{path} cannot be read ({type(error).__name__}: {said[:120]}): {repair}") from None

class Sink(io.RawIOBase):
    """A new file beside `path` that keeps the first error to itself: one raised inside torch.save can abort the process."""

    def __init__(self, path):
        self.path, self.error, self.size = f"{path}.tmp", None, 0
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.path)  # what a killed run left, or a link that somebody put there: never written through
        self.file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0), 0o666)

    def writable(self):
        return True

    def finish(self, path):
        """Flushed to disk, it becomes `path`. OSError if anything could not be written."""
        if self.error:
            raise self.error
        os.fsync(self.file)
        os.close(self.file)
        os.replace(self.path, path)

    def write(self, content):
        left = memoryview(content).cast("B")
        self.size += len(left)
        try:
            while left and not self.error:
                left = left[os.write(self.file, left):]
        except OSError as error:
            self.error = error
        return memoryview(content).nbytes

@contextlib.contextmanager
def written(path):
    """A binary file to write that becomes `path` at the end, flushed to disk: killed at any moment, the old file is there
    or the new one. UserError, in one line, if it cannot be written; what was there before stays, and nothing else."""
    sink = None
    try:
        sink = Sink(path)
        yield sink
        sink.finish(path)
    except BaseException as error:
        if sink:
            for undo in (lambda: os.close(sink.file), lambda: os.unlink(sink.path)):
                with contextlib.suppress(OSError):
                    undo()
        if not isinstance(error, OSError) or isinstance(error, UserError):
            raise
        need = f" of {sink.size:,} bytes" if sink else ""
        raise UserError(f"{path}{need} cannot be written: {error.strerror or error}; what was there before is kept") from None

def replace_file(path, content):
    """Write all of `content`, bytes, or nothing."""
    with written(path) as f:
        f.write(content)

# ---- what users see --------------------------------------------------------------------------------------------------

def help_text(groups, sections, choices, prefix=""):
    """The first paragraph of the script's docstring, the usage forms, and every key where it is defined."""
    script = next(filter(is_script, groups), {})
    run = f"python {os.path.basename(script.get('__file__', sys.argv[0]))}"
    out = [inspect.cleandoc(script.get("__doc__") or "").split("\n\n")[0], "",
           f"usage: {run} [config/NAME.py ...] [--key=value | --key value ...]", f"       {prefix}KEY=value {run} ...",
           "The command line wins over the environment, the environment over config files, a later file over an earlier."]
    every = {key: repr(default) for _, keys in sections for key, (default, _) in keys.items()}
    wide, wide_default = max(map(len, every), default=0), min(24, max(map(len, every.values()), default=0))
    for title, keys in sections:
        out += ["", title]
        for key, (_, comment) in keys.items():
            if key in every:  # a key of two groups is listed in the first
                names = f"[{' | '.join(map(str, choices[key]))}] " if key in choices else ""
                out.append(f"  --{key:<{wide}}  {every.pop(key):<{wide_default}}  {names}{comment}".rstrip())
    return "\n".join(out).lstrip()

def fail(message, code=2, kind="error: "):
    """Print `error: message` as one line on stderr, below any progress bar, and exit with code 2."""
    if bars := getattr(sys.modules.get("tqdm"), "tqdm", None):
        for bar in list(getattr(bars, "_instances", ())):
            bar.close()
    print(kind + " ".join(line.strip() for line in str(message).splitlines() if line.strip()), file=sys.stderr)
    raise SystemExit(code)

class Stopped(KeyboardInterrupt):
    """SIGTERM, which ends a script in the same manner as Ctrl-C does."""

def on_stop(handler):
    """`handler` for Ctrl-C and SIGTERM, but for those that the process was started to ignore, as nohup does."""
    for number in (signal.SIGINT, signal.SIGTERM):
        if threading.current_thread() is threading.main_thread() and signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, handler)

def stoppable():
    """For the first lines of a script: importing takes seconds, in which Ctrl-C ends it with one line, too."""
    def stop(signum, frame):
        print(f"stopped by {'Ctrl-C' if signum == signal.SIGINT else 'SIGTERM'} before anything was done", file=sys.stderr)
        os._exit(128 + signum)
    on_stop(stop)

class Stream:
    """Standard output or error that cannot end a run: what the terminal cannot encode is escaped, and a reader that
    has gone away or a full disk behind it is passed over."""

    def __init__(self, stream):
        self.stream = stream
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")

    def write(self, text):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            self.stream.write(text)
        return len(text)

    def flush(self):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            self.stream.flush()

    def __getattr__(self, name):
        return getattr(self.stream, name)

def too_large(error):
    """Does the exception say that memory does not suffice?"""
    words = "out of memory|can't allocate|allocate memory|Storage size calculation overflowed|too many dimensions|Overflow"
    return (isinstance(error, (MemoryError, OverflowError)) or type(error).__name__ == "OutOfMemoryError"
            or isinstance(error, RuntimeError) and re.search(words, str(error)))

@contextlib.contextmanager
def one_line_errors(stopped="what is unfinished was not kept"):
    """Around a script's main: what a user can cause (ValueError, OSError, too little memory) ends in one line and exit
    code 2, Ctrl-C and SIGTERM in one line with `stopped` and 130 or 143.

    Any other exception is a bug and keeps its traceback; NANODIR_DEBUG=1 keeps it for all.
    """
    for name in ("stdout", "stderr"):
        if not isinstance(getattr(sys, name), Stream):
            setattr(sys, name, Stream(getattr(sys, name)))
    def stop(signum, frame):
        raise KeyboardInterrupt if signum == signal.SIGINT else Stopped
    try:
        on_stop(stop)
        yield
    except KeyboardInterrupt as error:
        on_stop(signal.SIG_IGN)  # a second one must not cut the line off
        name, code = ("SIGTERM", 143) if isinstance(error, Stopped) else ("Ctrl-C", 130)
        fail(f"{name}: {stopped}", code, "stopped by ")
    except Exception as error:
        if os.environ.get("NANODIR_DEBUG") == "1":
            raise
        if isinstance(error, OSError) and error.filename and error.strerror:
            fail(f"{error.filename}: {error.strerror}")
        if too_large(error):
            fail(f"this does not fit into memory ({type(error).__name__}: {str(error)[:200]}): choose smaller sizes, "
                 "such as --device_bsz, --batch_size, --seq_len, --n_embd or --n_layer")
        if not isinstance(error, (ValueError, OSError)):
            raise
        # A ValueError that is not a UserError may also be a bug, so say how to see where it comes from.
        where = "" if isinstance(error, UserError) else " (NANODIR_DEBUG=1 shows where)"
        fail((str(error) or type(error).__name__) + where)
