"""The page and the picture of a denoising, in a real browser where there is one: what they show at the end is what was sampled."""
import functools
import html
import json
import re
import shutil
import subprocess
import xml.etree.ElementTree

import pytest

import data
from conftest import ROOT, ok

TEXT = "".join(f"{i} times {i + 1} is {i * (i + 1)} – so & <so>.\n" for i in range(300))
KINDS = {"masked_mean": [], "block": ["--direction=block", "--block_size=8"], "ar": ["--direction=causal"], "gaussian": ["--beta_schedule=linear"]}
SMALL = ["--data_path=t.txt", "--n_layer=1", "--n_embd=32", "--max_iters=3", "--eval_iters=1", "--batch_size=4", "--seq_len=256", "--wkv_impl=torch"]


@pytest.fixture(scope="module", params=KINDS)
def sampled(request, tmp_path_factory, zygote):
    """-> folder with a page and a picture, what the terminal said."""
    folder = tmp_path_factory.mktemp("page")
    (folder / "t.txt").write_text(TEXT)
    start = functools.partial(zygote.run, envs=[{}], cwd=folder, files=[folder / "out.txt", folder / "err.txt"])
    ok(start([f"{ROOT}/train.py", f"--objective={request.param}", *KINDS[request.param], *SMALL]))
    ok(start([f"{ROOT}/sample.py", "--prompt=3 <", "--num_samples=2", "--length=252", "--steps=64", "--html=d.html", "--svg=d.svg",
                     "--wkv_impl=torch", "--threshold=1"]))
    return request.param, folder, open(folder / "out.txt", encoding="utf-8", newline="").read()


def told(folder):
    page = (folder / "d.html").read_text()
    return page, json.loads(re.search(r'id="data">(.*?)</script>', page, re.S)[1])


def texts(said):
    return [data.visible(part).rstrip("\n") for part in said.split("---\n")[1:]]


def test_the_page_says_what_was_sampled(sampled):
    kind, folder, said = sampled
    page, data = told(folder)
    assert len(page.encode()) < 150_000 and not re.search(r"https?://|src=|@import|url\(", page)
    assert len(data["samples"]) == 2 and max(len(s["steps"]) for s in data["samples"]) >= (1 if kind == "ar" else 8)
    for i, (sample, want) in enumerate(zip(data["samples"], texts(said))):
        without_script = re.search(rf'id="s{i}">(.*?)</div>', page, re.S)[1]
        assert html.unescape(without_script).rstrip("\n") == "".join(sample["text"]).rstrip("\n") == want
        ids = list(sample["ids"])
        assert ids[:4] != [-1] * 4 and -1 in ids[4:]
        for step in sample["steps"]:
            for at in range(0, len(step), 3):
                assert sample["ids"][step[at]] == -1 and 0 <= step[at + 2] < 100            # what is given never changes
                ids[step[at]] = step[at + 1]
        assert -1 not in ids
        if kind != "gaussian":                                                              # and what is decided stays
            places = [place for step in sample["steps"] for place in step[::3]]
            assert len(places) == len(set(places)) == sample["ids"].count(-1)
    assert (data["block"], data["state"] > 0) == {"block": (8, True), "ar": (0, True)}.get(kind, (0, False))


def test_a_browser_plays_it_to_the_end_without_an_error(sampled):
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.skip("no chromium: apt install chromium")
    kind, folder, said = sampled
    done = subprocess.run([browser, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", f"--user-data-dir={folder}/browser",
                           "--virtual-time-budget=60000", "--dump-dom", f"file://{folder}/d.html"], capture_output=True, text=True, timeout=120)
    _, data = told(folder)
    steps = max(len(s["steps"]) for s in data["samples"])
    assert f'data-at="{steps}"' in done.stdout and f"{steps} / {steps}" in done.stdout and "CONSOLE" not in done.stderr, done.stderr[-2000:]
    for i, want in enumerate(texts(said)):
        cells = re.search(rf'id="s{i}">(.*?)</div>', done.stdout, re.S)[1]
        assert html.unescape(re.sub("<[^>]*>", "", cells)).rstrip("\n") == want
        assert 'class="cell mask' not in cells and ("edge" in cells) == (kind == "block")


def test_the_picture_shows_the_text_to_who_cannot_play_it(sampled):
    kind, folder, said = sampled
    root = xml.etree.ElementTree.parse(folder / "d.svg").getroot()
    tag = lambda name: f"{{http://www.w3.org/2000/svg}}{name}"
    shown = "".join(e.text or "" for e in root.iter(tag("text")) if e.get("visibility") != "hidden")
    assert re.sub(r"\s", "", shown) == re.sub(r"\s", "", "".join(texts(said)))
    hidden = [e for e in root.iter(tag("rect")) if e.get("class") == "m"]
    assert len(hidden) >= 400 and all(float(e.find(tag("set")).get("dur")[:-1]) > 0 for e in hidden)
    assert (folder / "d.svg").stat().st_size < 700_000
