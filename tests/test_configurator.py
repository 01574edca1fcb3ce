"""Every rule of configurator.py: where keys come from, precedence, types, one-line errors, the environment, --help."""
import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest

import configurator
from configurator import SettingError, UserError, configure, fail, one_line_errors

SCRIPT = '''"""A tiny script.
Second line of the summary.

Not in the help.
"""
import os
from configurator import configure, one_line_errors

_hidden = 1  # starts with an underscore
computed = os.getcwd()  # not a literal
nothing = None  # has no type
table = {"a": 1}  # not a type a user can give
out_dir = "out"  # where results go
n_steps = 10  # optimizer steps
learning_rate = 1e-3  # peak rate
offset = -1  # negative literal
dw_jrt = False  # seed layers  # from the layer below
compiled = True  # a switch that is on
betas = (0.9, 0.95)  # two floats
names = ["a"]  # some words
mixer = "rwkv7"  # a row of the table
struct_task = False  # train on struct
struct_eval = 0

with one_line_errors():
    cfg = configure(globals(), choices={"mixer": ("rwkv7", "biwkv", "attention")})
below = 3  # below the call
print(f"n_steps is {n_steps}")
'''
CHOICES = {"mixer": {"rwkv7": object, "biwkv": object, "attention": object}}  # a table: name -> class


@dataclass
class Base:
    """Fields whose comments stand in the base class."""

    n_layer: int = 12  # number of blocks
    _private: int = 1  # not a key


@dataclass
class Model(Base):
    dropout: float = 0.0  # probability
    sizes: list = field(default_factory=list)  # not a literal
    vocab_size: int = None  # set from the data


@pytest.fixture
def script(tmp_path, monkeypatch):
    """The globals of a script in an empty working directory."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "script.py").write_text(SCRIPT)
    return {"__file__": str(tmp_path / "script.py"), "__doc__": SCRIPT.split('"""')[1]}


def config(name, text):
    Path(name).parent.mkdir(exist_ok=True)
    Path(name).write_text(text)
    return name


def resolve(*groups, argv=(), env={}, **more):
    return configure(*groups, argv=list(argv), env=env, **more)


def message(*groups, **more):
    """The message of the SettingError that configure must raise: always one line."""
    with pytest.raises(SettingError) as caught:
        resolve(*groups, **more)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- groups ----------------------------------------------------------------------------------------------------------

def test_keys_of_a_script_are_its_literal_assignments_above_the_call(script):
    names = "out_dir n_steps learning_rate offset dw_jrt compiled betas names mixer struct_task struct_eval"
    assert " ".join(resolve(script).as_dict()) == names


def test_the_call_may_stand_inside_a_function(tmp_path):
    (tmp_path / "s.py").write_text("a = 1\ndef main():\n    cfg = configurator.configure(globals())\nb = 2\n")
    assert resolve({"__file__": str(tmp_path / "s.py")}).as_dict() == {"a": 1}


@pytest.mark.parametrize("end", ["def main():\n    pass", "class Net:\n    a = 5  # no key either", "async def go():\n    pass"])
def test_settings_end_at_the_first_def_or_class(tmp_path, end):
    """What stands below is a constant of the code, not a setting by accident."""
    (tmp_path / "s.py").write_text(f"import os\na = 1\nif a:\n    pass\nb = 2\n{end}\nLIMIT = 3\nconfigure(globals())\n")
    script = {"__file__": str(tmp_path / "s.py"), "LIMIT": 3}
    assert resolve(script).as_dict() == {"a": 1, "b": 2}
    assert "unknown key 'LIMIT'" in message(script, argv=["--LIMIT=4"])


def test_resolved_values_are_written_back_into_the_script(script):
    resolve(script, Model, argv=["--n_steps=3", "--n_layer=2"])
    assert script["n_steps"] == 3 and script["learning_rate"] == 1e-3
    assert "n_layer" not in script and "sources" not in script


def test_dataclass_fields_with_literal_defaults_are_keys():
    assert resolve(Model).as_dict() == {"n_layer": 12, "dropout": 0.0}


def test_plain_dict_group():
    cfg = resolve({"struct_len": (8, "digits")}, argv=["--struct_len=4"])
    assert cfg.struct_len == 4


def test_same_key_in_two_groups():
    assert resolve(Model, {"n_layer": (12, "the same")}, argv=["--n_layer=2"]).n_layer == 2
    for default in (6, 12.0, True):
        with pytest.raises(AssertionError, match="n_layer"):
            resolve(Model, {"n_layer": (default, "another")})


@pytest.mark.parametrize("bad", [{"x": (None, "")}, {"x": ({}, "")}, {"lines": (1, "")}, {"sources": (1, "")}])
def test_programming_errors_name_the_key(bad):
    with pytest.raises(AssertionError, match=next(iter(bad))):
        resolve(bad)


def test_choices_for_a_key_that_does_not_exist():
    with pytest.raises(AssertionError, match="mixr"):
        resolve(Model, choices={"mixr": ["a"]})


# ---- the result ------------------------------------------------------------------------------------------------------

def test_result(script, capsys):
    config("config/x.py", "learning_rate = 1\n")
    cfg = resolve(script, Model, argv=["config/x.py", "--n_layer=12"], env={"DW_JRT": "1", "PATH": "/bin"})
    shown = ["learning_rate = 1.0   (file config/x.py)", "dw_jrt = True   (env DW_JRT)", "n_layer = 12   (command line)"]
    assert cfg.lines() == shown and capsys.readouterr().out.splitlines() == shown
    assert cfg.sources["n_steps"] == "default" and cfg.sources["dw_jrt"] == "env DW_JRT"
    assert cfg.given("n_layer") and not cfg.given("n_steps")
    assert json.loads(json.dumps(cfg.as_dict()))["betas"] == [0.9, 0.95]
    cfg = resolve(Model, argv=["--n_layer=5"])
    assert cfg.pick(Model) == Model(n_layer=5) and cfg.pick(Model, vocab_size=9, n_layer=1) == Model(1, vocab_size=9)


def test_show(script, capsys):
    resolve(script, argv=["--n_steps=3"], show=False)
    resolve(script)
    assert capsys.readouterr().out == ""


def test_adjust_changes_only_what_the_user_left_alone(script, capsys):
    def adjust(cfg):
        if cfg.struct_task:
            cfg.default("n_steps", 1000, why="struct_task")
            cfg.default("learning_rate", 0.5, why="struct_task")

    cfg = resolve(script, argv=["--struct_task", "--learning_rate=0.1"], adjust=adjust)
    assert (cfg.n_steps, cfg.learning_rate) == (1000, 0.1) and script["n_steps"] == 1000
    assert cfg.sources["n_steps"] == "default with struct_task" and not cfg.given("n_steps")
    assert "n_steps = 1000   (default with struct_task)" in capsys.readouterr().out


def test_adjust_keeps_a_value_equal_to_the_default(script):
    assert resolve(script, argv=["--n_steps=10"], adjust=lambda cfg: cfg.default("n_steps", 7, why="x")).n_steps == 10


# ---- precedence and forms --------------------------------------------------------------------------------------------

def test_precedence(script):
    a, b = config("a.py", "n_steps = 1\noffset = 1\nlearning_rate = 0.1"), config("b.py", "n_steps = 2\noffset = 2")
    cfg = resolve(script, argv=["--n_steps=4", a, b], env={"N_STEPS": "3", "OFFSET": "3"})
    assert (cfg.n_steps, cfg.offset, cfg.learning_rate) == (4, 3, 0.1)
    assert resolve(script, argv=[a, b]).n_steps == 2 and resolve(script, argv=[b, a]).n_steps == 1


@pytest.mark.parametrize("argv, key, value", [
    (["--n_steps=3"], "n_steps", 3),
    (["--n_steps", "3"], "n_steps", 3),
    (["--n-steps", "3"], "n_steps", 3),
    (["--n-steps=1_000"], "n_steps", 1000),
    (["--offset", "-5"], "offset", -5),
    (["--learning_rate", "-1e-3"], "learning_rate", -1e-3),
    (["--learning_rate=1"], "learning_rate", 1.0),
    (["--out_dir=a=b"], "out_dir", "a=b"),
    (["--out_dir", "a=b"], "out_dir", "a=b"),
    (["--out_dir=--x"], "out_dir", "--x"),
    (["--out_dir=-1"], "out_dir", "-1"),
    (["--out_dir="], "out_dir", ""),
    (["--dw_jrt"], "dw_jrt", True),
    (["--dw_jrt", "--n_steps=1"], "dw_jrt", True),
    (["--dw_jrt", "empty.py"], "dw_jrt", True),
    (["--dw-jrt", "ON"], "dw_jrt", True),
    (["--compiled", "0"], "compiled", False),
    (["--n_steps=1", "--n_steps=2"], "n_steps", 2),
    (["--betas=1,2"], "betas", (1.0, 2.0)),
    (["--betas", "(0.5, 0.6)"], "betas", (0.5, 0.6)),
    (["--betas=0.5"], "betas", (0.5,)),
    (["--names=a,b"], "names", ["a", "b"]),
    (["--names=['x, y']"], "names", ["x, y"]),
    (["--names="], "names", []),
])
def test_command_line_forms(script, argv, key, value):
    config("empty.py", "")
    got = getattr(resolve(script, argv=argv), key)
    assert got == value and type(got) is type(value)


@pytest.mark.parametrize("value, words", [(True, "1 True yes on YES"), (False, "0 FALSE No off")])
def test_bool_words(script, value, words):
    for text in words.split():
        cfg = resolve(script, env={"DW_JRT": text, "COMPILED": text})
        assert cfg.dw_jrt is value and cfg.compiled is value


def test_default_argv_and_env_are_those_of_the_process(script, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["script.py", "--n_steps=3"])
    monkeypatch.setenv("OFFSET", "5")
    cfg = configure(script)
    assert (cfg.n_steps, cfg.offset) == (3, 5)


# ---- errors on values and keys ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("argv, parts", [
    (["--n_stesp=3"], ["unknown key 'n_stesp' (command line)", "did you mean 'n_steps'?", "--help"]),
    (["--n-stesp", "3"], ["'n-stesp'", "did you mean 'n_steps'?"]),
    (["--N_STEPS=3"], ["did you mean 'n_steps'?"]),
    (["--zzz=3"], ["unknown key 'zzz' (command line): --help"]),
    (["--_hidden=3"], ["_hidden"]),
    (["--below=3"], ["below"]),
    (["--n_steps=1.5"], ["n_steps = '1.5' (command line)", "whole number", "the default is 10"]),
    (["--n_steps=1e3"], ["n_steps"]),
    (["--learning_rate=fast"], ["learning_rate = 'fast'", "number"]),
    (["--learning_rate=nan"], ["learning_rate = 'nan'"]),
    (["--dw_jrt=2"], ["dw_jrt = '2'", "true", "false"]),
    (["--dw_jrt", "ture"], ["dw_jrt = 'ture'"]),
    (["--betas=a,b"], ["betas = 'a,b'", "1,2"]),
    (["--mixer=bikwv"], ["mixer = 'bikwv' (command line)", "rwkv7, biwkv, attention", "did you mean 'biwkv'?"]),
    (["--n_steps"], ["--n_steps has no value", "--n_steps=VALUE"]),
    (["--n_steps", "--offset=1"], ["--n_steps has no value"]),
    (["n_steps=3"], ["unexpected argument 'n_steps=3'", ".py", "--key=value"]),
    (["-n_steps=3"], ["unexpected argument '-n_steps=3'"]),
    (["nowhere.py"], ["nowhere.py", "No such file"]),
    (["confg/small.py"], ["confg/small.py", "did you mean 'config/small.py'?"]),
    (["config"], ["unexpected argument 'config'"]),
])
def test_command_line_errors(script, argv, parts):
    config("config/small.py", "n_steps = 1\n")
    got = message(script, argv=argv, choices=CHOICES)
    assert all(part in got for part in parts), got


def test_errors_name_the_environment_and_the_file(script):
    assert "offset = 'x' (env OFFSET)" in message(script, env={"OFFSET": "x"})
    assert "mixer = 'x' (env MIXER)" in message(script, env={"MIXER": "x"}, choices=CHOICES)
    assert "offset = 'x' (file a.py)" in message(script, argv=[config("a.py", "offset = 'x'")])


def test_choices_accept_any_iterable_the_default_and_members_of_a_list():
    group = {"task": ("", "none by default"), "parts": (("a",), "several")}
    choices = {"task": (name for name in ("struct", "add")), "parts": "abc"}
    cfg = resolve(group, argv=["--task=", "--parts=a,c"], choices=choices)
    assert cfg.task == "" and cfg.parts == ("a", "c")
    assert "one of b, c" in message(group, argv=["--task=a"], choices={"task": iter("bc")})
    assert "parts = 'd'" in message(group, argv=["--parts=a,d"], choices={"parts": "abc"})


def test_a_bad_value_that_a_later_source_replaces_is_still_an_error(script):
    assert "n_steps = 'x' (env N_STEPS)" in message(script, argv=["--n_steps=1"], env={"N_STEPS": "x"})


# ---- config files ----------------------------------------------------------------------------------------------------

def test_config_file_literals(script):
    lines = ['"""A preset."""', "# comment", "betas = (0, 1)  # ints are fine", "names = []", "dw_jrt = 1", "learning_rate = 2",
             "offset = -3"]
    config("a.py", "\n".join(lines))
    cfg = resolve(script, argv=["a.py"])
    assert (cfg.betas, cfg.names, cfg.dw_jrt, cfg.learning_rate, cfg.offset) == ((0.0, 1.0), [], True, 2.0, -3)


@pytest.mark.parametrize("line", ["import os", "open('hacked', 'w')", "n_steps = int(3)", "n_steps = offset", "n_steps = 5 * 8",
                                  "n_steps = offset = 1", "n_steps += 1", "if True:\n    n_steps = 1", "'text'"])
def test_config_files_are_not_executed(script, line):
    got = message(script, argv=[config("a.py", f'"""Preset."""\noffset = 1\n{line}\n')])
    assert "a.py:3:" in got and "`name = literal`" in got and line.splitlines()[0].split()[0] in got.replace('"', "'")
    assert not os.path.exists("hacked")


@pytest.mark.parametrize("content", [b"n_steps = \n", b"offset = '\xff'\n", b"\n\n\n\nz = '\xff'\n", b"offset = 1\x00\n"])
def test_config_file_that_is_not_python(script, content):
    Path("a.py").write_bytes(content)
    got = message(script, argv=["a.py"])
    assert got.startswith("a.py:") and "`name = literal`" in got


def test_config_file_errors(script):
    Path("dir.py").mkdir()
    assert "'dir.py': Is a directory" in message(script, argv=["dir.py"])
    assert "unknown key 'n_step' (file a.py): did you mean 'n_steps'?" in message(script, argv=[config("a.py", "n_step = 1")])
    assert "unknown key '_hidden'" in message(script, argv=[config("a.py", "_hidden = 1")])
    for line in ("n_steps = 1.5", "n_steps = True", "n_steps = None", "out_dir = 3", "learning_rate = True", "betas = 'a'",
                 "dw_jrt = 2"):
        assert f"{line} (file a.py): expected" in message(script, argv=[config("a.py", line)])


# ---- environment -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["STRUKT_TASK", "STRUCT_EVALS_EVAL", "DW_JRTT", "DW_JRT_SCAEL", "WKV_IMPLL", "X_TASK"])
def test_a_stray_name_of_an_owned_family_is_an_error(script, name):
    got = message(script, env={name: "1"})
    assert f"unknown key '{name}' (environment)" in got and "unset it" in got


def test_owned_family_suggests_and_is_a_parameter(script):
    assert "did you mean 'STRUCT_TASK'?" in message(script, env={"STRUKT_TASK": "1"})
    resolve(script, env={"FOO_TASK": "1"}, families=())
    assert "MY_X" in message(script, env={"MY_X": "1"}, families=["MY_*"])


def test_the_names_of_a_cluster_are_not_ours(script, capsys):
    resolve(script, env={"SLURM_CPUS_PER_TASK": "8", "struct_task": "1"})
    assert capsys.readouterr().err == ""


def test_near_miss_is_one_warning_line(script, capsys):
    cfg = resolve(script, env={"N_STEP": "3", "LEARNING_RATES": "", "n_step": "3"})
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "N_STEP " in err and "did you mean N_STEPS?" in err and cfg.n_steps == 10


def test_empty_environment_value(script):
    cfg = resolve(script, env={"STRUCT_TASK": "", "N_STEPS": "", "OUT_DIR": "", "OTHER_TASK": ""})
    assert not cfg.given("struct_task") and not cfg.given("n_steps") and cfg.out_dir == "" and cfg.given("out_dir")


ORDINARY = """PATH HOME TERM LANG LC_ALL PWD OLDPWD SHLVL SHELL USER LOGNAME HOSTNAME MAIL EDITOR PAGER DISPLAY TMPDIR TZ
LS_COLORS COLUMNS LINES CUDA_HOME CUDA_VISIBLE_DEVICES OMP_NUM_THREADS MKL_NUM_THREADS LD_LIBRARY_PATH
PYTHONPATH VIRTUAL_ENV MAX_JOBS RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT GROUP_RANK
WANDB_MODE HF_HOME XDG_CACHE_HOME SSH_TTY DEBUG SEED_DIR LOG_LEVEL CI SLURM_JOB_ID SLURM_NTASKS
SLURM_CPUS_PER_TASK TORCH_LOGS TRITON_CACHE_DIR CC CXX CFLAGS COLORTERM HISTSIZE _""".split()


@pytest.mark.parametrize("env", [dict.fromkeys(ORDINARY, "1"), dict(os.environ)], ids=["ordinary", "real"])
def test_no_false_alarm_from_an_ordinary_environment(env, capsys):
    names = """HEAD_SIZE SEQ_LEN N_LAYER N_EMBD BATCH_SIZE DEVICE_BSZ MAX_ITERS EVAL_INTERVAL EVAL_ITERS WARMUP_ITERS
    WARMDOWN_ITERS MUON_LR ADAM_LR LN_LR WTE_LR HEAD_LR LAMBDA_LR DW_JRT DW_JRT_SCALE TRAIN MEM_CHECK
    RANDOM_SEED WEIGHTS_PATH DATA_PATH DATA_BIN DATA_VAL_BIN VOCAB_SIZE GEN_TOKENS PROMPT_LEN LOG_SAMPLE LOG_WIN
    LOG_OUTPUT OUT_DIR DEVICE DTYPE COMPILE INIT_FROM STRUCT_TASK STRUCT_LEN STRUCT_EVAL WKV_IMPL""".lower().split()
    env = {name: value for name, value in env.items() if name.lower() not in names}
    assert not [s for s in resolve({n: (0, "") for n in names}, env=env).sources.values() if s != "default"]
    assert capsys.readouterr() == ("", "")


# ---- former keys -----------------------------------------------------------------------------------------------------

FORMER = ("*_eval", "mem_check")


def test_former_keys_are_accepted_without_effect(script, capsys):
    group = {"struct_len": (8, "digits")}
    plain = resolve(group)
    path = config("a.py", "add_eval = True\nmem_check = 3\nstruct_len = 4\n")
    for argv in (["--add_eval"], ["--add_eval=1"], ["--add-eval", "1"], ["--mem-check", "--add_eval=x"]):
        assert resolve(group, argv=argv, ignored=FORMER) == plain
    cfg = resolve(group, argv=["--mem_check", path, "--add_eval", "0"], ignored=FORMER)
    assert (cfg.struct_len, cfg.sources) == (4, {"struct_len": "file a.py"})
    env = {"ADD_EVAL": "1", "MEM_CHECK": "", "STRUCT_LEN": "5"}
    assert resolve(group, env=env, ignored=FORMER).as_dict() == {"struct_len": 5}
    assert capsys.readouterr().err == ""
    assert resolve(group, env={"X_ADD_EVAL": "1"}, prefix="X_", ignored=FORMER) == plain
    with pytest.raises(SystemExit):
        resolve(group, argv=["--help"], ignored=FORMER)
    assert "eval" not in capsys.readouterr().out


def test_a_key_wins_over_a_pattern_and_a_typo_is_still_an_error(script):
    assert resolve(script, argv=["--struct_eval=3"], ignored=FORMER).struct_eval == 3
    for argv in (["--add_evil=1"], ["--mem_chek"]):
        assert "unknown key" in message({"struct_len": (8, "")}, argv=argv, ignored=FORMER)
    assert "unknown key 'ADD_TASK'" in message({"struct_len": (8, "")}, env={"ADD_TASK": "1"}, ignored=FORMER)


def test_a_stored_configuration_may_hold_former_keys():
    """As of a checkpoint written when there were x_eval keys."""
    stored = {"struct_eval": True, "struct_len": 4, "mem_check": False}
    cfg = resolve({"struct_len": (8, "digits")}, adjust=lambda cfg: cfg.adopt(stored, (), "ckpt.pt"))
    assert cfg.as_dict() == {"struct_len": 4}


# ---- --help ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help(script, capsys, flag):
    with pytest.raises(SystemExit) as caught:  # help is an answer even where the rest of the line is wrong
        resolve(script, Model, {"struct_len": (8, "digits"), "n_layer": (12, "again")}, argv=["--wrong=1", flag], choices=CHOICES)
    out = capsys.readouterr().out
    lines = out.splitlines()
    assert caught.value.code == 0 and lines[:3] == ["A tiny script.", "Second line of the summary.", ""]
    assert "Not in the help." not in out and "_hidden" not in out and "--below" not in out
    assert "usage: python script.py [config/NAME.py ...] [--key=value | --key value ...]" in lines
    assert "       KEY=value python script.py ..." in lines
    titles = ["script.py", f"{__name__}.Model", "further keys"]
    assert [line for line in lines if line in titles] == titles  # each key where it is defined
    assert lines.index("script.py") < next(i for i, line in enumerate(lines) if "--out_dir" in line) < lines.index(titles[1])
    assert out.count("--n_layer ") == 1 and out.index(titles[1]) < out.index("--n_layer") < out.index("further keys")
    rows = {line.split()[0][2:]: line for line in lines if line.startswith("  --")}
    assert rows["n_steps"].split() == ["--n_steps", "10", "optimizer", "steps"]
    assert rows["n_layer"].endswith("number of blocks")  # a comment of a base class
    assert rows["mixer"].endswith("'rwkv7'      [rwkv7 | biwkv | attention] a row of the table")
    assert rows["struct_eval"].split() == ["--struct_eval", "0"]
    columns = {rows[key].index(text) for key, text in [("n_steps", "optimizer"), ("dropout", "prob"), ("struct_len", "digits")]}
    assert len(columns) == 1


def test_help_lists_what_matters_first(script, capsys):
    with pytest.raises(SystemExit):
        resolve(script, Model, argv=["--help"], first=("n_layer", "n_steps"))
    lines = capsys.readouterr().out.splitlines()
    top = lines.index("the ones that matter")
    assert [line.split()[0] for line in lines[top + 1:top + 3]] == ["--n_layer", "--n_steps"] and lines[top + 3] == ""
    assert lines[top + 4] == "script.py" and sum("--n_steps " in line for line in lines) == 1
    with pytest.raises(AssertionError, match="n_stesp"):
        resolve(script, first=("n_stesp",))


def test_help_joins_keys_that_differ_in_one_word(capsys):
    group = {"a_len": (8, "[1, 9] a: digits"), "bc_len": (8, "[1, 9] bc: digits"), "d_len": (16, "[1, 9] d: digits"),
             "e_len": (8, "[1, 5] e: digits"), "f_len": (8, ""), "g_len": (8, ""), "threads": (0, "[0, 9] threads")}
    with pytest.raises(SystemExit):
        resolve(group, argv=["--help"])
    rows = [line.split(maxsplit=2) for line in capsys.readouterr().out.splitlines() if line.startswith("  --")]
    assert rows == [["--a_len", "8", "[1, 9] a: digits; likewise bc_len, d_len (16)"], ["--e_len", "8", "[1, 5] e: digits"],
                    ["--f_len", "8"], ["--g_len", "8"], ["--threads", "0", "[0, 9] threads"]]


def test_help_without_source_or_docstring(tmp_path, capsys):
    space = {}
    exec("from dataclasses import dataclass\n@dataclass\nclass Made:\n    width: int = 3  # no source to read\n", space)
    (tmp_path / "s.py").write_text("a = 1\n")
    with pytest.raises(SystemExit):
        resolve({"__file__": str(tmp_path / "s.py"), "__doc__": None}, space["Made"], argv=["-h"])
    assert capsys.readouterr().out.startswith("usage: python s.py")


# ---- one line, exit code 2 -------------------------------------------------------------------------------------------

def test_fail(capsys):
    with pytest.raises(SystemExit) as caught:
        fail("two\n  lines")
    assert caught.value.code == 2 and capsys.readouterr() == ("", "error: two lines\n")


@pytest.mark.parametrize("error, line", [
    (SettingError("n_layer = 'x'"), "error: n_layer = 'x'\n"),
    (UserError("text is too long"), "error: text is too long\n"),
    (ValueError("C = 3 is\nnot a multiple"), "error: C = 3 is not a multiple (NANODIR_DEBUG=1 shows where)\n"),
    (ValueError(), "error: ValueError (NANODIR_DEBUG=1 shows where)\n"),
    (FileNotFoundError(2, "No such file or directory", "ckpt.pt"), "error: ckpt.pt: No such file or directory\n"),
    (PermissionError(13, "Permission denied", "out"), "error: out: Permission denied\n"),
])
def test_one_line_errors(monkeypatch, capsys, error, line):
    monkeypatch.delenv("NANODIR_DEBUG", raising=False)

    @one_line_errors()  # as a decorator; the scripts below use `with`
    def main():
        raise error

    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 2 and capsys.readouterr().err == line
    monkeypatch.setenv("NANODIR_DEBUG", "1")
    with pytest.raises(type(error)):
        main()


@pytest.mark.parametrize("error", [KeyError("x"), AssertionError("x"), RuntimeError("x")])
def test_bugs_keep_their_traceback(error):
    with pytest.raises(type(error)):
        with one_line_errors():
            raise error


@pytest.mark.parametrize("write", ["f.write(bytes(10**6))", "__import__('numpy').save(f, __import__('numpy').zeros(10**6))"])
def test_what_cannot_be_written_says_why_and_leaves_the_old_file(tmp_path, write):
    path = tmp_path / "z.npy"
    path.write_bytes(b"old")
    code = (f"import resource, configurator\nresource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
            f"with configurator.one_line_errors(), configurator.written({str(path)!r}) as f:\n    {write}\n")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(configurator.__file__).parent)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "z.npy of 1,0" in done.stderr or "z.npy of 8,0" in done.stderr, done.stderr
    assert "cannot be written: File too large" in done.stderr
    assert os.listdir(tmp_path) == ["z.npy"] and path.read_bytes() == b"old"


def run(script, *args, **env):
    clean = {k: v for k, v in os.environ.items() if k not in ("NANODIR_DEBUG", "N_STEPS")}
    root = str(Path(configurator.__file__).parent)
    env = clean | {"PYTHONPATH": root} | env
    return subprocess.run([sys.executable, script["__file__"], *args], capture_output=True, text=True, env=env)


def test_a_script_from_the_shell(script):
    good = run(script, "--n_steps", "3", OFFSET="4")
    assert (good.returncode, good.stdout) == (0, "n_steps = 3   (command line)\noffset = 4   (env OFFSET)\nn_steps is 3\n")
    bad = run(script, "--n_layers=3")
    assert (bad.returncode, bad.stdout, bad.stderr.count("\n")) == (2, "", 1)
    assert bad.stderr.startswith("error: unknown key 'n_layers' (command line)")
    debug = run(script, "--n_layers=3", NANODIR_DEBUG="1")
    assert debug.returncode == 1 and "Traceback" in debug.stderr
    asked = run(script, "--help")
    assert asked.returncode == 0 and asked.stdout.startswith("A tiny script.") and "n_steps is" not in asked.stdout


def test_import_has_no_side_effects_and_needs_only_the_standard_library():
    code = ("import os, sys; os.environ = None; import configurator;"
            "sys.exit(any(name.split('.')[0] in ('torch', 'numpy', 'model', 'tasks') for name in sys.modules))")
    assert subprocess.run([sys.executable, "-S", "-c", code], cwd=Path(configurator.__file__).parent).returncode == 0
