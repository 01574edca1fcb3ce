"""Settings: default < config files left to right < environment variable KEY < --key=value or --key value.

The keys of a script are the plain assignments at its top, those of a model its dataclass fields; neither is written twice:

    max_iters = 1000  # optimizer steps            <- key, default, type (int) and help text

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
import sys
import tokenize
from fnmatch import fnmatchcase
from types import SimpleNamespace

BOOLS = dict.fromkeys(("1", "true", "yes", "on"), True) | dict.fromkeys(("0", "false", "no", "off"), False)
EXPECTED = {  # the types a key can have -> what to tell a user who gave something else
    bool: "one of " + " ".join(BOOLS), int: "a whole number such as 12 or 1_000", float: "a number such as 0.1 or 3e-4",
    str: "text in quotes", tuple: "values such as 1,2 or (1, 2)", list: "values such as 1,2 or [1, 2]"}
FAMILIES = ("*_TASK", "*_EVAL", "DW_JRT*", "WKV_*")  # environment names that can only be meant for us ...
FOREIGN = ("*_PER_TASK",)  # ... but SLURM_CPUS_PER_TASK and its kin belong to the cluster

class UserError(ValueError):
    """Base of what a user can cause; the message is one line naming the value, what is allowed, and the repair."""

class SettingError(UserError):
    """A setting that is unknown, mistyped or outside its choices."""

class Settings(SimpleNamespace):
    """Each key is an attribute; `sources[key]` is "default", "default with X", "file F", "env KEY" or "command line"."""

    def given(self, key):
        """True if the user set the key, be it to its default. KeyError if there is no such key."""
        return not self.sources[key].startswith("default")

    def default(self, key, value, why):
        """For `adjust`: another default for `key`, because of the setting `why`. A value that the user gave stays."""
        if not self.given(key) and getattr(self, key) != value:
            setattr(self, key, value)
            self.sources[key] = f"default with {why}"

    def pick(self, cls, **more):
        """An instance of the dataclass `cls`, from those of its fields that are keys; `more` overrides."""
        mine = {f.name: getattr(self, f.name) for f in dataclasses.fields(cls) if f.init and f.name in self.sources}
        return cls(**(mine | more))

    def as_dict(self):
        """All keys and values, ready for json.dumps."""
        return {key: getattr(self, key) for key in self.sources}

    def lines(self):
        """A line such as `dw_jrt = True   (env DW_JRT)` for each key that is not at its plain default."""
        return [f"{key} = {getattr(self, key)!r}   ({source})" for key, source in self.sources.items() if source != "default"]

def configure(*groups, choices={}, families=FAMILIES, argv=None, env=None, adjust=None, show=True):
    """Resolve every key of `groups` -> Settings.

    groups     a script's globals() (its resolved values are written back), a dataclass type, or a dict name -> (default,
               comment). In a script or a dataclass, a _name or a default that is not a literal of EXPECTED is no key.
    choices    key -> iterable of allowed names, such as a table; the default is allowed as well
    families   patterns of environment names that must resolve to a key
    argv, env  the command line without the script's name, and the environment; None: those of this process
    adjust     called with the Settings before they are printed, for defaults that depend on others: `cfg.default(...)`
    Errors: SettingError for what a user can cause, AssertionError for what only the programmer can. --help exits with 0.
    """
    argv, env = sys.argv[1:] if argv is None else argv, os.environ if env is None else env
    choices = {key: list(names) for key, names in choices.items()}
    sections = [section(group) for group in groups]
    defaults = merge(sections, choices)
    if "-h" in argv or "--help" in argv:
        print(help_text(groups, sections, choices))
        raise SystemExit(0)

    cfg = Settings(**defaults, sources=dict.fromkeys(defaults, "default"))
    files, options = split_argv(argv, defaults)
    given = [(key, value, f"file {path}") for path in files for key, value in read_config(path, defaults)]
    given += [(key, text, f"env {key.upper()}") for key, text in read_environment(env, defaults, families)]
    given += [(key, text, "command line") for key, text in options]
    for key, value, source in given:  # in order of precedence: the last one stays
        setattr(cfg, key, checked(key, value, defaults[key], choices.get(key), source))
        cfg.sources[key] = source
    if adjust:
        adjust(cfg)
    for group, (_, keys) in zip(groups, sections):
        if is_script(group):
            group.update({key: getattr(cfg, key) for key in keys})
    for line in cfg.lines() if show else ():
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
    """key -> default of all sections. A key may stand in two of them only if it means the same in both."""
    defaults = {}
    for title, keys in sections:
        for key, (default, _) in keys.items():
            if repr(defaults.setdefault(key, default)) != repr(default):
                raise AssertionError(f"{title}: key {key!r} has default {default!r} here and {defaults[key]!r} elsewhere")
            if type(default) not in EXPECTED or key == "sources" or hasattr(Settings, key):
                raise AssertionError(f"{title}: key {key!r} needs a default of bool, int, float, str, tuple or list, and a name "
                                     "that is no member of Settings")
    if unknown_keys := choices.keys() - defaults.keys():
        raise AssertionError(f"choices for {sorted(unknown_keys)}, which are keys of no group")
    return defaults

# ---- what users give -------------------------------------------------------------------------------------------------

def read_config(path, defaults):
    """The (key, value) pairs of a config file: comments, a docstring, and lines `name = literal`."""
    allowed = "a config file holds only comments and lines `name = literal`"
    try:
        with open(path, "rb") as file:  # bytes, so that ast reports a wrong encoding too
            tree = ast.parse(file.read())
    except OSError as error:
        near = nearest(path, glob.glob("config/*.py"))
        raise SettingError(f"config file {path!r}: {error.strerror}" + (f"; did you mean {near!r}?" if near else "")) from None
    except (SyntaxError, ValueError) as error:  # ValueError: a null byte, before Python 3.12
        raise SettingError(f"{path}:{getattr(error, 'lineno', None) or 1}: {getattr(error, 'msg', error)}: {allowed}") from None
    for node in tree.body[ast.get_docstring(tree) is not None:]:
        if not (pair := assigned(node)):
            raise SettingError(f"{path}:{node.lineno}: {ast.unparse(node).splitlines()[0]!r}: {allowed}")
        if pair[0] not in defaults:
            raise unknown(pair[0], f"file {path}", defaults)
        yield pair

def read_environment(env, defaults, families):
    """The (key, text) pairs of the environment. A stray name of an owned family is an error, another near miss a warning."""
    names = {key.upper(): key for key in defaults}
    for name, text in env.items():
        key = names.get(name)
        if text == "" and not isinstance(defaults.get(key), str):
            continue  # `X_TASK= python ...` is how a shell unsets a variable for one command
        if key:
            yield key, text
        elif any(fnmatchcase(name, owned) for owned in families) and not any(fnmatchcase(name, other) for other in FOREIGN):
            raise unknown(name, "environment", names, repair="unset it, or see --help for all keys")
        elif name.isupper() and (near := nearest(name, names, cutoff=0.85)):
            print(f"warning: environment variable {name} has no effect; did you mean {near}?", file=sys.stderr)

def split_argv(argv, defaults):
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
        if key not in defaults:
            raise unknown(name, "command line", defaults)
        if not equals and isinstance(defaults[key], bool) and (alone or rest[0].endswith(".py")):
            text = "true"
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

def checked(key, value, like, allowed, source):
    """`value` with the type of the default `like`, and one of `allowed` if that is a list; else SettingError."""
    try:
        result = convert(value, like)
    except (ValueError, TypeError, KeyError, SyntaxError):
        raise SettingError(f"{key} = {value!r} ({source}): expected {EXPECTED[type(like)]}; the default is {like!r}") from None
    for part in result if isinstance(result, (tuple, list)) else [result]:
        if allowed is not None and part not in allowed and result != like:
            near = nearest(part, allowed)
            raise SettingError(f"{key} = {part!r} ({source}): must be one of {', '.join(map(str, allowed))}"
                               + (f"; did you mean {near!r}?" if near else ""))
    return result

def nearest(name, names, cutoff=0.6):
    """The one of `names` most like `name`, or None."""
    lower = {str(n).lower().replace("-", "_"): n for n in names}
    return next((lower[n] for n in difflib.get_close_matches(str(name).lower().replace("-", "_"), lower, 1, cutoff)), None)

def unknown(name, source, names, repair="--help lists all keys"):
    near = nearest(name, names)
    return SettingError(f"unknown key {name!r} ({source}): " + (f"did you mean {near!r}? " if near else "") + repair)

# ---- what users see --------------------------------------------------------------------------------------------------

def help_text(groups, sections, choices):
    """The first paragraph of the script's docstring, the usage forms, and every key where it is defined."""
    script = next(filter(is_script, groups), {})
    run = f"python {os.path.basename(script.get('__file__', sys.argv[0]))}"
    out = [inspect.cleandoc(script.get("__doc__") or "").split("\n\n")[0], "",
           f"usage: {run} [config/NAME.py ...] [--key=value | --key value ...]", f"       KEY=value {run} ...",
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

def fail(message):
    """Print `error: message` as one line on stderr and exit with code 2."""
    print("error:", " ".join(line.strip() for line in str(message).splitlines()), file=sys.stderr)
    raise SystemExit(2)

@contextlib.contextmanager
def one_line_errors():
    """Around a script's main: what a user can cause (ValueError, OSError) ends in one line and exit code 2.

    Any other exception is a bug and keeps its traceback; NANODIR_DEBUG=1 keeps it for all.
    """
    try:
        yield
    except (ValueError, OSError) as error:
        if os.environ.get("NANODIR_DEBUG") == "1":
            raise
        if isinstance(error, OSError) and error.filename and error.strerror:
            fail(f"{error.filename}: {error.strerror}")
        # A ValueError that is not a UserError may also be a bug, so say how to see where it comes from.
        where = "" if isinstance(error, UserError) else " (NANODIR_DEBUG=1 shows where)"
        fail((str(error) or type(error).__name__) + where)
