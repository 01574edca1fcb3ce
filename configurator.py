"""Settings: default < config files left to right < environment variable KEY < --key=value or --key value.

The keys of a script are the plain assignments at its top, those of a model its dataclass fields:

    max_iters = 1000  # [1, 1e9] optimizer steps   <- key, default, type (int), allowed values and help text

    with one_line_errors():
        cfg = configure(globals(), ModelConfig, choices={"mixer": TIME_MIXERS})
        main(cfg.pick(ModelConfig), max_iters)     # the resolved value is back in the plain name

What users type gets the type of the default, is checked, and named in errors. Config files are not executed.
"""
import ast, contextlib, dataclasses, difflib, glob, inspect, io, os, re, signal, sys, threading
from fnmatch import fnmatchcase
from types import SimpleNamespace
from typing import NamedTuple

BOOLS = dict.fromkeys(("1", "true", "yes", "on"), True) | dict.fromkeys(("0", "false", "no", "off"), False)
EXPECTED = {  # the types a key can have -> what to tell a user who gave something else
    bool: "one of " + " ".join(BOOLS), int: "a whole number such as 12 or 1_000",
    float: "a number such as 0.1 or 3e-4", str: "text in quotes",
    tuple: "values such as 1,2 or (1, 2)", list: "values such as 1,2 or [1, 2]"}
FAMILIES = ("*_TASK", "*_EVAL", "DW_JRT*", "WKV_*")  # environment names that can only be meant for us ...
FOREIGN = ("*_PER_TASK",)  # ... but SLURM_CPUS_PER_TASK and its kin belong to the cluster
PATHS = ("*path", "*_dir", "*_file", "*_bin", "ckpt", "out", "latent", "init_from", "rwkv_lm")  # have ~
LARGEST = 2**63 - 1  # no whole number above it fits a tensor

class UserError(ValueError):
    """What a user can cause; the message is one line naming the value, what is allowed, and the repair."""

class SettingError(UserError):
    """A setting that is unknown, mistyped or outside its choices."""

class Interval(NamedTuple):
    """The numbers that a key may have: `[1, 10]` with both ends, `(0, 1)` without; its comment begins so."""
    opening: str
    low: float
    high: float
    closing: str

    def __contains__(self, x):
        at_end = self.opening == "[" and x == self.low or self.closing == "]" and x == self.high
        return at_end or self.low < x < self.high

    def __str__(self):
        return f"{self.opening}{self.low:g}, {self.high:g}{self.closing}"

class Key(NamedTuple):
    """What is known of a key."""
    default: object
    interval: object = None  # Interval or None
    names: object = None  # list of allowed values or None
    comment: str = ""

class Settings(SimpleNamespace):
    """Each key is an attribute; `keys[key]` is its Key, `sources[key]` where its value is from: "default",
    "default with X", "file F", "env KEY" or "command line"."""

    def given(self, key):
        """True if the user set the key, be it to its default. KeyError if there is no such key."""
        return not self.sources[key].startswith("default")

    def default(self, key, value, why):
        """For `adjust`: another default for `key`, because of the setting `why`. What the user gave stays."""
        if not self.given(key) and getattr(self, key) != value:
            setattr(self, key, value)
            self.sources[key] = f"default with {why}"

    def adopt(self, values, keep, why):
        """For `adjust`: all defaults but those to `keep` come from an earlier run, a dict that may hold keys
        of another version. SettingError for a value that the key cannot have."""
        for key in values.keys() & self.keys.keys() - set(keep):
            self.default(key, checked(key, values[key], self.keys[key], why), why)

    def pick(self, cls, **more):
        """An instance of the dataclass `cls`, from those of its fields that are keys; `more` overrides."""
        names = [f.name for f in dataclasses.fields(cls) if f.init and f.name in self.keys]
        return cls(**({name: getattr(self, name) for name in names} | more))

    def as_dict(self):
        """All keys and values as JSON has them."""
        values = {key: getattr(self, key) for key in self.keys}
        return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}

    def lines(self, sources=("",)):
        """A line `dw_jrt = True   (env DW_JRT)` for each key from these sources, if not at its default."""
        return [f"{key} = {getattr(self, key)!r}   ({source})" for key, source in self.sources.items()
                if source != "default" and source.startswith(sources)]

def configure(*groups, choices={}, families=FAMILIES, first=(), ignored=(), argv=None, env=None, prefix="",
              adjust=None, show=True):
    """Resolve every key of `groups` -> Settings.

    groups     a script's globals() (its resolved values are written back), a dataclass type, or a dict
               name -> (default, comment). In a script or a dataclass, a _name or a default that is not a
               literal of EXPECTED is not a key. The keys of a script end at its first def or class.
    choices    key -> iterable of allowed names, such as a table; the default is allowed as well
    families   patterns of environment names that must resolve to a key
    first      the keys that --help lists first
    ignored    patterns of former keys: accepted wherever a key is, without effect
    argv, env  the command line without the script's name, and the environment; None: those of this process
    prefix     of names in the environment, except those of `families`: plain words are other programs', too
    adjust     called with the Settings before they are printed, for defaults that depend on others
    show       print every key that is not at its default; False: only what was taken from the environment
    SettingError for what a user can cause, AssertionError for what only the programmer can. --help exits."""
    argv = sys.argv[1:] if argv is None else argv
    env = os.environ if env is None else env
    choices = {key: list(names) for key, names in choices.items()}
    sections = [section(group) for group in groups]
    keys = merge(sections, choices, first)
    if "-h" in argv or "--help" in argv:
        print(help_text(groups, sections, keys, first, prefix))
        raise SystemExit(0)

    cfg = Settings(**{key: row.default for key, row in keys.items()}, keys=keys)
    cfg.sources = dict.fromkeys(keys, "default")
    files, options = split_argv(argv, keys)
    given = [row for path in files for row in read_config(path)]
    given += [*read_environment(env, keys, families, prefix, ignored), *options]
    for name, value, source in given:  # in order of precedence: the last one stays
        key = name.replace("-", "_")
        if key in keys:
            setattr(cfg, key, checked(key, value, keys[key], source))
            cfg.sources[key] = source
        elif not fits(key, ignored):
            raise unknown(name, source, keys)
    if adjust:
        adjust(cfg)
    for group, (_, mine) in zip(groups, sections):
        if is_script(group):
            group.update({key: getattr(cfg, key) for key in mine})
    for line in cfg.lines(("",) if show else ("env ",)):
        print(line)
    return cfg

# ---- where keys are defined ------------------------------------------------------------------------------

def is_script(group):
    return isinstance(group, dict) and "__file__" in group

def section(group):
    """A group -> (title, {key: (default, comment)})."""
    if is_script(group):
        title = os.path.basename(group["__file__"])
        with open(group["__file__"], "rb") as file:
            source = file.read()
        found = definitions(source, ast.parse(source).body)
    elif dataclasses.is_dataclass(group):
        title, notes = f"{group.__module__}.{group.__qualname__}", {}
        for base in reversed(group.__mro__):  # the comment of an inherited field stands in its base
            with contextlib.suppress(OSError, TypeError, SyntaxError):  # no source (typed at a prompt)
                source = inspect.getsource(base).encode()
                notes |= definitions(source, ast.parse(source).body[0].body)
        fields = [f for f in dataclasses.fields(group) if f.init]
        found = {f.name: (f.default, notes.get(f.name, ("", ""))[1]) for f in fields}
    else:
        return "further keys", group
    return title, {key: row for key, row in found.items() if key[0] != "_" and type(row[0]) in EXPECTED}

def definitions(source, nodes):
    """{name: (literal or None, comment)} of the assignments before any def, class or call of configure."""
    lines, found = source.splitlines(), {}
    for node in nodes:
        calls = [ast.unparse(n.func).split(".")[-1] for n in ast.walk(node) if isinstance(n, ast.Call)]
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) or "configure" in calls:
            break
        comment = lines[node.end_lineno - 1][node.end_col_offset:].decode().partition("#")[2].strip()
        if pair := assigned(node):
            found[pair[0]] = (pair[1], comment)
        elif isinstance(node, ast.AnnAssign):
            found[ast.unparse(node.target)] = (None, comment)
    return found

def assigned(node):
    """The statement `name = literal` -> (name, value), any other -> None."""
    if isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
        with contextlib.suppress(ValueError, TypeError):  # what literal_eval raises for an expression
            return node.targets[0].id, ast.literal_eval(node.value)

def merge(sections, choices, first=()):
    """key -> Key of all sections. A key may stand in two of them only if it means the same in both."""
    found = {}
    for title, keys in sections:
        for key, (default, comment) in keys.items():
            ends = re.match(r"([\[(])([-+.\w]+), ([-+.\w]+)([\])])", comment)
            interval = ends and Interval(ends[1], float(ends[2]), float(ends[3]), ends[4])
            row = found.setdefault(key, Key(default, interval, choices.get(key), comment))
            taken = key in ("sources", "keys") or hasattr(Settings, key)
            if taken or type(default) not in EXPECTED or repr(row.default) != repr(default):
                raise AssertionError(f"{title}: {key!r} needs a name that Settings does not use, and one "
                                     f"default of bool, int, float, str, tuple or list, not {default!r}")
    if unknown_keys := {*choices, *first} - found.keys():
        raise AssertionError(f"choices or first: {sorted(unknown_keys)} are keys of no group")
    return found

# ---- what users give -------------------------------------------------------------------------------------

def fits(name, patterns):
    return any(fnmatchcase(name, pattern) for pattern in patterns)

def read_config(path):
    """The (key, value, source) of a config file: comments, a docstring, and lines `name = literal`."""
    allowed = "a config file holds only comments and lines `name = literal`"
    try:
        with open(os.path.expanduser(path), "rb") as file:  # bytes, so that ast reports a wrong encoding too
            tree = ast.parse(file.read())
        for node in tree.body[ast.get_docstring(tree) is not None:]:
            if not (pair := assigned(node)):
                said = ast.unparse(node).splitlines()[0]
                raise SyntaxError(repr(said), (path, node.lineno, 0, ""))
            yield *pair, f"file {path}"
    except OSError as error:
        near = did_you_mean(path, glob.glob("config/*.py"), before="; ")
        raise SettingError(f"config file {path!r}: {error.strerror}{near}") from None
    except (RecursionError, MemoryError):  # what Python's parser says to 20,000 minus signs
        raise SettingError(f"{path}: an expression in it is nested too deeply: {allowed}") from None
    except (SyntaxError, ValueError) as error:  # ValueError: a null byte, before Python 3.12
        where = getattr(error, "lineno", None) or 1
        raise SettingError(f"{path}:{where}: {getattr(error, 'msg', error)}: {allowed}") from None

def read_environment(env, keys, families, prefix="", ignored=()):
    """The (key, text, source) of the environment. Strays of `families` are errors, near misses warnings."""
    names = {key.upper() if fits(key.upper(), families) else prefix + key.upper(): key for key in keys}
    others = [*FOREIGN, *(prefix + pattern.upper() for pattern in ignored)]
    for name, text in env.items():
        key = names.get(name)
        if text == "" and not (key and isinstance(keys[key].default, str)):
            continue  # `X_TASK= python ...` is how a shell unsets a variable for one command
        if key:
            yield key, text, f"env {name}"
        elif fits(name, others):
            continue
        elif fits(name, families):
            raise unknown(name, "environment", names, "unset it, or see --help for all keys")
        elif name.isupper() and (near := nearest(name, names, cutoff=0.85)):
            said = f"warning: environment variable {name} has no effect; did you mean {near}?"
            print(said, file=sys.stderr)

def split_argv(argv, keys):
    """A command line -> ([config file], [(key, text, source)])."""
    files, options, rest = [], [], list(argv)
    while rest:
        word = rest.pop(0)
        name, equals, text = word[2:].partition("=")  # the first = only: a value may hold more
        default = keys.get(name.replace("-", "_"), Key(False)).default
        alone = not rest or re.match("--[A-Za-z]", rest[0])  # one dash may begin a value: --lr -1
        if word.endswith(".py") and not word.startswith("--"):
            files.append(word)
            continue
        if not word.startswith("--"):
            allowed = "a config file ends in .py, a setting is --key=value"
            raise SettingError(f"unexpected argument {word!r}: {allowed}")
        if not equals and isinstance(default, bool) and (alone or rest[0].endswith(".py")):
            text = "true"
        elif not equals and not alone:
            text = rest.pop(0)
        elif not equals and default and isinstance(default, str):  # as in `sample.py --ckpt`
            text = default
        elif not equals:
            raise SettingError(f"--{name} has no value: write --{name}=VALUE or --{name} VALUE")
        options.append((name, text, "command line"))
    return files, options

def convert(value, like):
    """Text, or a literal of a config file -> the type of `like`. It may raise all that `checked` expects."""
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
    """`value` with the type of the default of the Key `row`. SettingError: not in its interval or names."""
    def wrong(part, why):
        return SettingError(f"{key} = {short(part)} ({source}): {why}")
    like = row.default
    try:
        result = convert(value, like)
    except (ValueError, TypeError, KeyError, SyntaxError, RecursionError, MemoryError):
        raise wrong(value, f"expected {EXPECTED[type(like)]}; the default is {like!r}") from None
    if isinstance(result, str) and "\0" in result:
        raise wrong(value, "holds a null character, leave it out")
    if isinstance(result, str) and fits(key, PATHS):
        result = os.path.expanduser(result)
    if isinstance(result, (tuple, list)) and row.interval and not result:
        result = like
    for part in result if isinstance(result, (tuple, list)) else [result]:
        number = isinstance(part, (int, float)) and not isinstance(part, bool)
        if number and row.interval and part not in row.interval:
            raise wrong(part, f"must be in {row.interval}; the default is {like!r}")
        if number and isinstance(part, int) and abs(part) > LARGEST:
            raise wrong(part, "is too large, give at most 2^63 - 1")
        if row.names is not None and part not in row.names and result != like:
            near = did_you_mean(part, row.names, before="; ")
            raise wrong(part, f"must be one of {', '.join(map(str, row.names))}{near}")
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

def did_you_mean(name, names, before="", after=""):
    near = nearest(name, names)
    return f"{before}did you mean {near!r}?{after}" if near else ""

def unknown(name, source, names, repair="--help lists all keys"):
    near = did_you_mean(name, names, after=" ")
    return SettingError(f"unknown key {short(name)} ({source}): {near}{repair}")

# ---- files: read or refused in one line, written whole or not at all -------------------------------------

@contextlib.contextmanager
def reading(path, repair):
    """Around a reader of a file, which may be damaged or foreign: whatever it raises becomes a UserError with
    path and repair. A UserError, or a ValueError that names the path already, stays as it is."""
    try:
        yield
    except Exception as error:
        named = str(path) in str(error) and isinstance(error, (ValueError, OSError))
        if named or isinstance(error, UserError):
            raise
        if isinstance(error, OSError) and error.strerror:
            raise UserError(f"{path}: {error.strerror}") from None
        said = " ".join(str(error).split()) or "no more is known"
        raise UserError(f"{path} cannot be read ({type(error).__name__}: {said[:120]}): {repair}") from None

class Sink(io.RawIOBase):
    """A new file beside `path` that keeps its first error for `finish`: in torch.save it can abort Python."""

    def __init__(self, path):
        self.name, self.error, self.size = f"{path}.tmp", None, 0
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.name)  # what a killed run left, or a link that somebody put there
        self.file = open(self.name, "xb", buffering=0)  # x: never written through a link

    def writable(self):
        return True

    def write(self, content):
        left = memoryview(content).cast("B")
        n = len(left)
        self.size += n
        try:
            while left and not self.error:
                left = left[self.file.write(left):]
        except OSError as error:
            self.error = error
        return n

    def finish(self, path):
        """Flushed to disk, it becomes `path`. OSError if anything could not be written."""
        if self.error:
            raise self.error
        os.fsync(self.file.fileno())
        self.file.close()
        os.replace(self.name, path)

@contextlib.contextmanager
def written(path):
    """A binary file to write that becomes `path` at the end, flushed to disk: killed at any moment, the old
    file is there or the new one. UserError if it cannot be written; then all is as it was before."""
    sink = None
    try:
        sink = Sink(path)
        yield sink
        sink.finish(path)
    except BaseException as error:
        if sink:
            with contextlib.suppress(OSError):
                sink.file.close()
                os.unlink(sink.name)
        if not isinstance(error, OSError):
            raise
        need = f" of {sink.size:,} bytes" if sink else ""
        said = error.strerror or error
        raise UserError(f"{path}{need} cannot be written: {said}; what was there before is kept") from None

def replace_file(path, content):
    """Write all of `content`, bytes, or nothing."""
    with written(path) as f:
        f.write(content)

# ---- what users see --------------------------------------------------------------------------------------

def help_rows(keys):
    """Keys -> (name, default, comment). Those that differ in one word alone, which their comments repeat, as
    struct_len and add_len do, share the row of the first."""
    rows = {}
    for key, row in keys.items():
        word, _, rest = key.partition("_")
        general = re.sub(rf"\b{word}\b", "", row.comment)
        same = (rest, general) if general != row.comment else key
        rows.setdefault(same, []).append(key)
    for key, *others in rows.values():
        row, comment = keys[key], keys[key].comment
        others = [k if keys[k].default == row.default else f"{k} ({keys[k].default})" for k in others]
        if others:
            comment += f"; likewise {', '.join(others)}"
        if row.names is not None:
            comment = f"[{' | '.join(map(str, row.names))}] {comment}"
        yield key, repr(row.default), comment

def help_text(groups, sections, keys, first=(), prefix=""):
    """The first paragraph of the script's docstring, usage, the keys of `first`, the others by section."""
    script = next(filter(is_script, groups), {})
    run = f"python {os.path.basename(script.get('__file__', sys.argv[0]))}"
    out = [inspect.cleandoc(script.get("__doc__") or "").split("\n\n")[0], "",
           f"usage: {run} [config/NAME.py ...] [--key=value | --key value ...]",
           f"       {prefix}KEY=value {run} ...",
           "The command line wins over the environment, the environment over config files, a later file over "
           "an earlier."]
    wide = max(map(len, keys), default=0)
    wide_default = min(24, max((len(repr(row.default)) for row in keys.values()), default=0))
    left = dict(keys)
    for title, names in [("the ones that matter", first), *sections]:
        rows = list(help_rows({key: left.pop(key) for key in names if key in left}))
        out += ["", title] if rows else []
        for name, default, comment in rows:
            out.append(f"  --{name:<{wide}}  {default:<{wide_default}}  {comment}".rstrip())
    return "\n".join(out).lstrip()

def fail(message, code=2, kind="error: "):
    """Print `error: message` as one line on stderr, below any progress bar, and exit with code 2."""
    if bars := getattr(sys.modules.get("tqdm"), "tqdm", None):
        for bar in list(getattr(bars, "_instances", ())):
            bar.close()
    lines = [line.strip() for line in str(message).splitlines()]
    print(kind + " ".join(filter(None, lines)), file=sys.stderr)
    raise SystemExit(code)

STOPS = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}

def on_stop(handler):
    """`handler` for Ctrl-C and SIGTERM, except what the process was started to ignore, as nohup does."""
    for number in STOPS:
        ours = threading.current_thread() is threading.main_thread()
        if ours and signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, handler)

def script():
    """For a script's first lines, before it imports torch, which takes seconds: Ctrl-C ends it with one line
    then, too; idle threads (libgomp's) soon stop waiting in a loop, which takes other programs' time."""
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    def stop(signum, frame):
        print(f"stopped by {STOPS[signum]} before anything was done", file=sys.stderr)
        os._exit(128 + signum)
    on_stop(stop)

class Stream:
    """Standard output or error that cannot end a run: what the terminal cannot encode is escaped; that its
    reader has gone away or its disk is full is passed over."""

    def __init__(self, stream):
        self.stream = stream
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            self.stream.write(text)
        return len(text)

    def flush(self):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            self.stream.flush()

def too_large(error):
    """Does the exception say that memory does not suffice?"""
    words = ("out of memory|can't allocate|allocate memory|Storage size calculation overflowed|"
             "too many dimensions|Overflow")
    return (isinstance(error, (MemoryError, OverflowError)) or type(error).__name__ == "OutOfMemoryError"
            or isinstance(error, RuntimeError) and re.search(words, str(error)))

@contextlib.contextmanager
def one_line_errors(stopped="what is unfinished was not kept"):
    """Around a script's main: what a user can cause (ValueError, OSError, too little memory) ends in one line
    and exit code 2, Ctrl-C and SIGTERM in one line with `stopped` and 130 or 143. Anything else is a bug and
    keeps its traceback; NANODIR_DEBUG=1 keeps it for all."""
    def stop(signum, frame):
        raise KeyboardInterrupt(signum)
    for name in ("stdout", "stderr"):
        if not isinstance(getattr(sys, name), Stream):
            setattr(sys, name, Stream(getattr(sys, name)))
    try:
        on_stop(stop)
        yield
    except KeyboardInterrupt as error:
        on_stop(signal.SIG_IGN)  # a second one must not cut the line off
        signum = signal.SIGTERM if signal.SIGTERM in error.args else signal.SIGINT
        fail(f"{STOPS[signum]}: {stopped}", 128 + signum, "stopped by ")
    except Exception as error:
        if os.environ.get("NANODIR_DEBUG") == "1":
            raise
        if isinstance(error, OSError) and error.filename and error.strerror:
            fail(f"{error.filename}: {error.strerror}")
        if too_large(error):
            said = f"{type(error).__name__}: {str(error)[:200]}"
            fail(f"this does not fit into memory ({said}): choose smaller sizes, such as --device_bsz, "
                 "--batch_size, --seq_len, --n_embd or --n_layer")
        if not isinstance(error, (ValueError, OSError)):
            raise
        # A ValueError that is not a UserError may also be a bug, so say how to see where it comes from.
        where = "" if isinstance(error, UserError) else " (NANODIR_DEBUG=1 shows where)"
        fail((str(error) or type(error).__name__) + where)
