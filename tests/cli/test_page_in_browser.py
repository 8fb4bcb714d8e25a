"""What a browser makes of the page: at a desk, on a phone, in the dark and on paper."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from page_samples import deep, made

pytest.importorskip("igraph")
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium")
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking")
DARK = "--blink-settings=preferredColorScheme=0"


def see(text: str, script: str, folder: Path, width: int = 390, *options: str) -> Any:
    """What a script returns that runs in a page, in headless Chromium, at a width of the window.

    The page stands in a frame, as no window is as narrow as a phone.
    """
    runs = f"""<script>
      const errors = []; addEventListener("error", event => errors.push(event.message));
      const next = () => new Promise(done => setTimeout(done, 500));
      addEventListener("load", async () => {{
        await next();
        parent.postMessage(await (async () => {{ {script} }})(), "*");
      }});
    </script></head>"""
    (folder / "page.html").write_text(text.replace("</head>", runs), encoding="utf-8")
    frame = folder / "frame.html"
    frame.write_text(f"""<!doctype html><pre></pre><script>
      addEventListener("message", event => {{
        document.querySelector("pre").textContent = JSON.stringify(event.data);
      }});
      </script><iframe src="page.html" style="width: {width}px; height: 800px; border: 0">""")
    command = [
        *(str(CHROMIUM), *FLAGS, *options, f"--user-data-dir={folder / 'profile'}"),
        *("--window-size=1400,900", "--virtual-time-budget=5000", "--dump-dom", frame.as_uri()),
    ]
    for _ in range(3):  # on a busy machine the frame may be too late
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
        if found := re.search(r"<pre>(.+?)</pre>", done.stdout, re.DOTALL):
            return json.loads(html.unescape(found[1]))
    return pytest.fail("the page did not answer")


@pytest.mark.parametrize("width", [1200, 390], ids=["desk", "phone"])
def test_a_browser_shows_all_of_the_page(width: int, tmp_path: Path) -> None:
    script = """
      for (const stage of document.querySelectorAll("details")) stage.open = true;
      await next();
      const scrolls = box =>
        box.scrollHeight > box.clientHeight || box.scrollWidth > box.clientWidth;
      const says = one =>
        [...one.childNodes].some(child => child.nodeType === 3 && child.data.trim());
      const text = [...document.body.querySelectorAll("*")]
        .filter(one => one.getClientRects().length && says(one));
      const scale = one => one.getScreenCTM?.().a ?? 1;
      const size = one => parseFloat(getComputedStyle(one).fontSize) * scale(one);
      const inside = (one, other) => {
        const [a, b] = [one.getBoundingClientRect(), other.getBoundingClientRect()];
        return a.left >= b.left && a.right <= b.right && a.top >= b.top && a.bottom <= b.bottom;
      };
      const nodes = [...document.querySelectorAll(".node")];
      return {
        errors,
        wide: document.documentElement.scrollWidth > innerWidth,
        small: text.filter(one => size(one) < 12).map(one => one.textContent),
        cut: nodes.filter(node => !inside(node.querySelector("text"), node.querySelector("rect")))
          .map(node => node.textContent),
        clipped: [...document.querySelectorAll(".key li, td")]
          .filter(one => one.scrollWidth > one.clientWidth).length,
        texts: text.length,
        silent: [...document.querySelectorAll(".scroll")]
          .filter(box => scrolls(box) === box.previousElementSibling.hidden).length,
        title: getComputedStyle(document.querySelector("td"), "::before").content,
      };"""
    for text in (made(), deep()):
        seen = see(text, script, tmp_path, width)
        assert seen.pop("texts") > 100
        assert seen.pop("title") == ('"site"' if width < 500 else "none")  # cards on a phone
        faults = {"errors": [], "small": [], "cut": []}
        assert seen == {**faults, "wide": False, "clipped": 0, "silent": 0}


@pytest.mark.parametrize("options", [(), (DARK,)], ids=["light", "dark"])
def test_text_has_contrast(options: tuple[str, ...], tmp_path: Path) -> None:
    script = """
      const numbers = colour => colour.match(/[\\d.]+/g).map(Number);
      const light = colour => numbers(colour).slice(0, 3).map(v => v / 255)
        .map(v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
        .reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0);
      const ground = one => {
        const rect = one.parentNode.querySelector(":scope > rect");
        if (rect) return getComputedStyle(rect).fill;
        for (; one; one = one.parentElement) {
          const colour = getComputedStyle(one).backgroundColor;
          if (numbers(colour)[3] !== 0) return colour;
        }
      };
      const low = [];
      const kinds = "p, h1, h2, td, th button, li, summary, text, span, b";
      for (const one of document.body.querySelectorAll(kinds)) {
        const style = getComputedStyle(one);
        const [a, b] = [one.matches("text") ? style.fill : style.color, ground(one)].map(light);
        const contrast = (Math.max(a, b) + .05) / (Math.min(a, b) + .05);
        if (!(contrast >= 4.5)) low.push([one.textContent, contrast]);
      }
      return [low, light(getComputedStyle(document.body).backgroundColor) < .5];"""
    for text in (made(), deep()):
        assert see(text, script, tmp_path, 390, *options) == [[], bool(options)]


def test_boxes_tell_what_they_are_by_touch_and_by_keyboard(tmp_path: Path) -> None:
    script = """
      const told = () => document.querySelector("#detail").checkVisibility()
        ? document.querySelector("#detail output").textContent.split("\\n")[0] : null;
      const press = key => document.activeElement.dispatchEvent(
        new KeyboardEvent("keydown", { key, bubbles: true }));
      const boxes = document.querySelectorAll(".node"), seen = [told()];
      const act = what => { what(); seen.push(told()); };
      act(() => boxes[1].dispatchEvent(new MouseEvent("click", { bubbles: true })));
      act(() => document.body.click());
      act(() => boxes[0].focus());
      act(() => press("ArrowDown"));
      act(() => press("ArrowUp"));
      act(() => press("Escape"));
      return [...seen, document.querySelectorAll(".node[tabindex='0']").length];"""
    seen = see(made(), script, tmp_path)
    assert seen == [
        None,
        "_0_0 (Conv2d)",
        None,
        "input_1 (input)",
        "_0_0 (Conv2d)",
        "input_1 (input)",
        None,
        2,
    ]


def test_a_dashed_box_leads_to_its_stage(tmp_path: Path) -> None:
    script = """
      const stages = document.querySelectorAll("details");
      stages[0].open = true;
      const click = new MouseEvent("click", { bubbles: true, cancelable: true });
      stages[0].querySelector("a.node").dispatchEvent(click);
      await next();
      return [...stages].slice(0, 3).map(stage => stage.open);"""
    assert see(deep(), script, tmp_path) == [True, True, False]


def test_the_table_sorts_and_filters(tmp_path: Path) -> None:
    script = """
      const rows = () => [...document.querySelectorAll("#sites tbody tr")]
        .filter(row => row.checkVisibility()).map(row => row.cells[1].textContent);
      const set = (selector, value) => {
        const field = document.querySelector(selector);
        field.value = value;
        for (const kind of ["input", "change"]) field.dispatchEvent(new Event(kind));
      };
      document.querySelectorAll("#sites th button")[1].click();
      const seen = [rows()];
      for (const words of ["GroupNorm statistics", "groupnorm identity", ""]) {
        set("#words", words);
        seen.push(rows());
      }
      set("#status", "removed");
      return [...seen, rows(), document.querySelector("#count").textContent, errors];"""
    everything = ["merged", "refused", "removed"]
    for width in (390, 1200):
        seen = see(made(), script, tmp_path, width)
        assert seen[:3] == [everything, ["refused"], []]
        assert seen[3:] == [everything, ["removed"], "1 of 3 sites", []]


@pytest.mark.skipif(not shutil.which("pdftotext"), reason="needs poppler-utils")
def test_all_of_it_is_on_paper(tmp_path: Path) -> None:
    page_file, printed = tmp_path / "page.html", tmp_path / "page.pdf"
    read = ["pdftotext", str(printed), "-"]
    for text in (made(), deep().replace("<details>", "<details open>")):
        page_file.write_text(text, encoding="utf-8")
        command = [str(CHROMIUM), *FLAGS, DARK, f"--print-to-pdf={printed}", page_file.as_uri()]
        subprocess.run(command, capture_output=True, timeout=120, check=True)
        done = subprocess.run(read, capture_output=True, text=True, check=True)
        labels = re.findall(r"<text x=[^>]*>(.*?)</text>", text)
        assert "add 4" in labels
        for label in set(labels):
            assert done.stdout.count(label) >= labels.count(label)
        assert done.stdout.count("exactness") >= text.count("<tr data-status=") - 1  # not refused
