"""The playground in a real browser against a real server.

The model is tiny and random: its numbers must add up, its answers mean nothing.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import pytest
from playwright.sync_api import Browser, BrowserContext, Route, expect

from tests.server.browser import CHROMIUM, Playground, contrast, launched, number, save_screenshot, tree_of_turns
from tests.server.running import Running, make_engine, running

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine: apt-get install chromium")

PASSAGE = "The ferry to Inchcolm leaves at nine and at noon. It carries forty people and no cars."
Open = Callable[..., Playground]


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server that asks for an API key."""
    with running(make_engine(tmp_path_factory.mktemp("guarded")), api_keys=["open-sesame"]) as server:
        yield server


@pytest.fixture(scope="module")
def browser(server_url: str, guarded: Running) -> Iterator[Browser]:
    """One browser; the servers come first, since they start event loops in this thread."""
    with launched() as browser:
        yield browser


@pytest.fixture(scope="module")
def desktop(browser: Browser) -> BrowserContext:
    """One profile, so that files come from its cache; a tab keeps nothing for the next."""
    return browser.new_context(viewport={"width": 1280, "height": 900})


@pytest.fixture
def visit(browser: Browser, desktop: BrowserContext, server_url: str) -> Iterator[Open]:
    """Opens the page in a tab. Afterwards its console must hold only what a test has expected."""
    opened: list[Playground] = []

    def visit(url: str = server_url, **options: Any) -> Playground:
        page = browser.new_page(**options) if options else desktop.new_page()
        opened.append(Playground(page, url))
        opened[-1].page.locator("#max-tokens").evaluate("field => { field.value = 24 }")
        return opened[-1]

    yield visit
    problems = [problem for playground in opened for problem in playground.problems]
    for playground in opened:
        playground.page.close()
    assert not problems


@pytest.fixture
def chat(visit: Open) -> Playground:
    """A conversation of one turn over a document."""
    playground = visit().connected()
    playground.paste("Ferries", PASSAGE)
    playground.ask("When does the ferry leave?")
    playground.drawn("answer")
    return playground


def test_a_message_goes_out_with_its_documents_and_its_tokens_are_drawn(chat: Playground) -> None:
    page = chat.page
    expect(page.locator(".turn")).to_have_count(2)
    expect(page.locator(".turn.user .passage summary")).to_have_text("Ferries")
    expect(page.locator("#attached li")).to_have_count(0)
    assert chat.figure("prompt") == chat.figure("reused") + chat.figure("computed") == chat.cells()
    assert chat.figure("saved") == chat.cells("reused") == chat.figure("reused")
    text = "".join(page.locator(".drawing .cell").all_text_contents())
    assert PASSAGE in text
    assert text.endswith("<|im_start|>assistant\n")


def test_the_next_turn_leaves_documents_where_they_were_and_reuses_them(chat: Playground) -> None:
    first = chat.figure("prompt")
    with chat.page.expect_request("**/v1/chat/completions") as asked:
        chat.ask("And back?")
    chat.page.locator(".calls li").nth(1).wait_for()
    chat.drawn("answer")
    messages = json.loads(asked.value.post_data or "")["messages"]
    assert [bool(message.get("documents")) for message in messages] == [True, False, False]
    assert chat.figure("reused") >= first - 1
    assert chat.figure("reused") + chat.figure("computed") == chat.figure("prompt")


def test_an_intrinsic_shows_its_result_its_probabilities_and_who_owns_which_token(chat: Playground) -> None:
    chat.run("jailbreak")
    chat.drawn("jailbreak")
    row = chat.intrinsic("jailbreak")
    assert row.locator(".value").inner_text() in ("yes", "no")
    shares = [float(share) for share in row.locator(".bar-number").all_inner_texts()]
    assert len(shares) == 2
    assert sum(shares) == pytest.approx(1, abs=0.02)
    wide = [box["width"] for box in map(Playground.box, row.locator(".fill").all())]
    assert (wide[0] > wide[1]) == (shares[0] > shares[1])
    invoked = [cell.text_content() for cell in chat.page.locator(".drawing .cell:not(.owner-base)").all()]
    assert "".join(map(str, invoked)) == "<|im_start|>jailbreak\n"
    assert chat.figure("computed") <= len(invoked)
    assert chat.figure("plain") == chat.figure("prompt") == chat.cells()
    expect(chat.page.locator('[data-figure="plain"] dt')).to_have_text("A plain LoRA would compute")


def test_all_intrinsics_at_once_share_one_prefix(chat: Playground) -> None:
    chat.page.get_by_label("requirement", exact=True).fill("It names a time.")
    chat.run_all()
    chat.drawn("4 intrinsics at once")
    for name in ("jailbreak", "answerability", "certainty", "requirement_check"):
        assert chat.intrinsic(name).locator(".bar").count() >= 2
        assert re.search(r"Turn 1: [\d,]+ reused, [\d,]+ computed", chat.intrinsic(name).inner_text())
    assert chat.figure("prompt") == chat.figure("reused") + chat.figure("computed")
    names = chat.page.locator(".drawing .branch-name").all_inner_texts()
    assert sorted(names) == ["answerability", "certainty", "jailbreak", "requirement_check"]
    # Drawn once, the shared tokens are fewer than those of four prompts.
    assert chat.cells() < chat.figure("prompt")
    assert chat.cells("computed") == chat.figure("computed")


def test_calls_are_listed_with_what_they_saved(chat: Playground) -> None:
    chat.run("answerability")
    chat.drawn("answerability")
    rows = chat.page.locator(".calls li")
    expect(rows).to_have_count(2)
    for row in rows.all():
        reused, computed = (number(part) for part in row.locator(".call-cost").inner_text().split(", ")[:2])
        saved = row.locator(".saved").inner_text()
        assert (number(saved) if reused else 0) == reused
        assert computed > 0
    expect(rows.first.locator(".saved")).to_contain_text("about")
    expect(chat.page.locator("#estimate")).to_contain_text("estimate: tokens saved times")
    rows.nth(1).get_by_role("button").click()
    chat.drawn("an earlier call: answer")
    assert chat.figure("prompt") == chat.cells()


def test_the_cache_moves_as_one_chats(chat: Playground) -> None:
    page = chat.page
    before = page.locator(".node").count()
    assert before > 0
    assert page.locator(".meter").get_attribute("aria-valuetext")
    chat.run_all()
    page.locator(f".tree:has(.node:nth-child({before + 1}))").wait_for()
    assert page.locator(".node:not(.owner-base)").count() > 0
    said = page.locator(".tree").get_attribute("aria-label") or ""
    assert number(said) == page.locator(".node").count()


def test_what_needs_an_answer_waits_for_one(visit: Open) -> None:
    chat = visit().connected()
    button = chat.intrinsic("certainty").get_by_role("button")
    expect(button).to_be_disabled()
    expect(button).to_have_attribute("title", "Needs an answer first")
    expect(chat.page.locator("#run-all")).to_be_disabled()
    chat.ask("Hello")
    expect(button).to_be_enabled()
    expect(button).to_have_attribute("title", "")


def test_an_empty_argument_is_asked_for(chat: Playground) -> None:
    field = chat.page.get_by_label("requirement", exact=True)
    field.fill("")
    chat.run("requirement_check")
    expect(chat.intrinsic("requirement_check").locator(".problem")).to_have_text("Fill in the requirement first.")
    expect(field).to_be_focused()
    field.fill("It is short.")
    field.press("Enter")
    chat.intrinsic("requirement_check").locator(".value").wait_for()


def test_a_result_of_an_earlier_turn_is_marked(chat: Playground) -> None:
    chat.run("certainty")
    expect(chat.intrinsic("certainty").locator(".stale")).to_have_count(0)
    chat.ask("Another question")
    expect(chat.intrinsic("certainty").locator(".stale")).to_have_count(1)


def test_errors_are_shown_where_they_happen(chat: Playground) -> None:
    error = {"message": "this adapter is tired", "type": "server_error", "param": None, "code": "forward_failed"}
    chat.page.route("**/v1/intrinsics/jailbreak", lambda route: route.fulfill(status=500, json={"error": error}))
    chat.run("jailbreak")
    expect(chat.intrinsic("jailbreak").locator(".problem")).to_contain_text("adapter is tired")
    chat.paste("Too long", "x" * 4000)
    chat.page.locator("#message").fill("Does this fit?")
    chat.page.keyboard.press("Enter")
    expect(chat.page.locator("#log .problem")).to_be_visible()
    expect(chat.page.locator("#message")).to_have_value("Does this fit?")
    expect(chat.page.locator("#attached li")).to_have_count(1)
    expect(chat.page.locator(".turn")).to_have_count(2)
    chat.expect_failed_requests(2)


def test_a_server_that_is_gone_is_named_until_it_is_back(chat: Playground) -> None:
    chat.page.route("**/v1/**", lambda route: route.abort())
    chat.page.locator("#message").fill("Anybody there?")
    chat.page.keyboard.press("Enter")
    expect(chat.page.locator("#notice")).to_contain_text("cannot be reached")
    expect(chat.page.locator("#log .problem")).to_contain_text("cannot be reached")
    chat.page.unroute("**/v1/**")
    expect(chat.page.locator("#notice")).to_be_hidden()
    chat.problems.clear()


def test_a_cache_that_may_not_be_seen_is_hidden(visit: Open) -> None:
    chat = visit().connected()
    error = {"message": "no", "type": "permission_error", "param": None, "code": "permission_denied"}
    chat.page.route("**/v1/cache", lambda route: route.fulfill(status=403, json={"error": error}))
    chat.page.reload()
    expect(chat.page.locator("#cache-note")).to_contain_text("does not show its cache")
    expect(chat.page.locator("#cache")).to_be_hidden()
    chat.ask("Hello")
    chat.drawn("answer")
    expect(chat.page.locator('[data-figure="saved"]')).not_to_contain_text("about")
    chat.expect_failed_requests(1)


def test_an_api_key_is_asked_for_and_used(visit: Open, guarded: Running) -> None:
    chat = visit(guarded.url)
    page = chat.page
    expect(page.locator("#notice")).to_contain_text("asks for an API key")
    expect(page.locator("#key")).to_be_focused()
    page.keyboard.type("wrong")
    page.keyboard.press("Enter")
    expect(page.locator("#notice")).to_contain_text("does not accept this API key")
    expect(page.locator("#key")).to_be_focused()
    page.locator("#key").fill("open-sesame")
    page.keyboard.press("Enter")
    chat.connected()
    expect(page.locator("#notice")).to_be_hidden()
    chat.ask("Hello")
    chat.drawn("answer")
    chat.problems[:] = [problem for problem in chat.problems if "401" not in problem]


def test_text_is_never_markup(visit: Open) -> None:
    chat = visit().connected()
    attack = "<img src=x onerror=\"document.title='owned'\"><b>bold</b>"
    chat.paste(attack, attack)
    chat.ask(attack)
    chat.drawn("answer")
    expect(chat.page.locator(".turn.user > .said")).to_have_text(attack)
    assert chat.page.locator("main img, main b").count() == 0
    assert chat.page.title() == "midstream playground"


def test_files_become_documents(visit: Open) -> None:
    chat = visit().connected()
    chat.page.locator("#add summary").click()
    files = [
        {"name": "note.md", "mimeType": "text/markdown", "buffer": b"# Ferries\nThey leave at nine."},
        {"name": "photo.png", "mimeType": "image/png", "buffer": b"\x89PNG"},
        {"name": "bad.txt", "mimeType": "text/plain", "buffer": b"\xff\xfe\xff"},
    ]
    chat.page.locator("#files").set_input_files(files)  # type: ignore[arg-type]
    expect(chat.page.locator("#attached .chip-name")).to_have_text(["note"])
    expect(chat.page.locator("#doc-note")).to_contain_text("photo.png is not a .txt or .md file.")
    expect(chat.page.locator("#doc-note")).to_contain_text("bad.txt could not be read as UTF-8 text.")
    chat.page.get_by_role("button", name="Remove note").click()
    expect(chat.page.locator("#attached li")).to_have_count(0)


def test_an_opening_brings_its_passages(visit: Open) -> None:
    chat = visit().connected()
    chat.page.locator(".opening").first.click()
    expect(chat.page.locator("#attached .chip-name")).to_have_text(["The Erie Canal"])
    expect(chat.page.locator("#message")).not_to_have_value("")
    expect(chat.page.locator("#message")).to_be_focused()


def test_the_keyboard_is_enough(chat: Playground) -> None:
    page = chat.page
    reached = set()
    page.locator("body").evaluate("body => { document.activeElement.blur(); body.focus(); }")
    for _ in range(60):
        page.keyboard.press("Tab")
        name, outline = chat.focus()
        reached.add(name)
        assert outline != "none" or name == "BODY", f"the focus on {name} cannot be seen"
    wanted = {"fresh", "Settings", "log", "Add documents", "message", "send", "run-all", "Run jailbreak", "as-text"}
    assert wanted | {"argument-requirement_check-requirement", "inspect", "call", "Tree of the cache"} <= reached
    page.locator("#inspect").focus()
    page.keyboard.press("ArrowRight")
    expect(page.locator("#inspect")).to_have_attribute("aria-valuetext", re.compile("^Token 2: .*base model"))
    page.locator("#message").focus()
    page.keyboard.type("one")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("two")
    expect(page.locator("#message")).to_have_value("one\ntwo")
    page.keyboard.press("Enter")
    chat.answered()
    expect(page.locator(".turn.user > .said").last).to_have_text("one\ntwo")


def test_escape_stops_an_answer_and_keeps_what_was_said(visit: Open) -> None:
    chat = visit().connected()

    def without_end(route: Route) -> None:
        """A random model may end an answer at any token."""
        route.continue_(post_data=json.dumps({**json.loads(route.request.post_data or "{}"), "ignore_eos": True}))

    chat.page.route("**/v1/chat/completions", without_end)
    chat.page.locator("#max-tokens").evaluate("field => { field.value = 1500 }")
    chat.page.locator("#message").fill("Tell me everything.")
    chat.page.keyboard.press("Enter")
    chat.page.locator(".turn.assistant .said:not(:empty)").wait_for()
    expect(chat.page.locator("#stop")).to_be_visible()
    chat.page.keyboard.press("Escape")
    chat.answered()
    expect(chat.page.locator(".turn.assistant .note")).to_have_text("Stopped here.")
    expect(chat.page.locator("#send")).to_be_visible()


def test_a_new_conversation_clears_everything(chat: Playground) -> None:
    chat.run("jailbreak")
    chat.page.locator("#fresh").click()
    for gone in (".turn", ".cell", ".call", ".value", ".figures:not(.three)"):
        expect(chat.page.locator(gone)).to_have_count(0)
    expect(chat.intrinsic("jailbreak").get_by_role("button")).to_be_disabled()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours_can_be_told_apart(visit: Open, scheme: str) -> None:
    chat = visit(color_scheme=scheme)
    grounds = [chat.color(name) for name in ("bg", "surface", "sunk")]
    assert (sum(grounds[0]) > 1.5) == (scheme == "light")
    for ground in grounds:
        assert contrast(chat.color("text"), ground) >= 7
        assert contrast(chat.color("muted"), ground) >= 4.5
    for one, other in (("danger", "danger-bg"), ("danger", "surface"), ("on-ink", "ink")):
        assert contrast(chat.color(one), chat.color(other)) >= 4.5
    assert contrast(chat.color("field-line"), chat.color("surface")) >= 3
    for owner in ("base", *range(1, 9)):
        # Computed tokens carry text in the colour of the surface.
        assert contrast(chat.color(f"c-{owner}"), chat.color("surface")) >= 4.5, owner


def test_nothing_sticks_out_on_a_phone(visit: Open) -> None:
    chat = visit(viewport={"width": 360, "height": 740}, has_touch=True).connected()
    chat.paste("A title that goes on and on " * 4, PASSAGE)
    assert chat.width() == (360, 360)
    chat.ask("x" * 150)
    chat.page.get_by_label("requirement", exact=True).fill("It names a time.")
    chat.run_all()
    chat.drawn("4 intrinsics at once")
    assert chat.width() == (360, 360)
    chat.page.locator("#settings summary").click()
    chat.page.locator("#as-text").click()
    assert chat.width() == (360, 360)


def test_a_strip_of_three_thousand_tokens_fits(visit: Open) -> None:
    chat = visit(viewport={"width": 360, "height": 740}).connected()
    chat.page.evaluate(
        """async () => {
            const { drawStrip } = await import("/playground/strip.js");
            const cell = (_, id) => ({ id, text: " a", owner: id < 2990 ? null : "jailbreak", reused: id < 2991 });
            const cells = Array.from({ length: 3000 }, cell);
            drawStrip({ calls: [{ label: "jailbreak", owner: "jailbreak" }], cells, children: [] });
        }"""
    )
    assert chat.cells() == 3000
    assert chat.cells("computed") == 9
    assert chat.width() == (360, 360)
    drawing = chat.page.locator(".drawing")
    assert Playground.box(drawing)["height"] < 700
    assert drawing.get_attribute("aria-label") == "3,000 tokens, 2,991 of them reused"


def test_bars_of_the_tree_never_overlap(visit: Open) -> None:
    nodes = tree_of_turns(12) + tree_of_turns(5, first_id=1000)
    script = 'async nodes => (await import("/playground/tree.js")).layout(nodes)'
    drawn = visit().connected().page.evaluate(script, nodes)
    assert len(drawn["placed"]) == len(nodes)
    bars: dict[int, list[tuple[int, int]]] = {}
    for place in drawn["placed"]:
        bars.setdefault(place["row"], []).append((place["start"], place["start"] + place["node"]["tokens"]))
        assert place["from"] is None or place["from"] < place["row"]
    for row in bars.values():
        ordered = sorted(row)
        assert all(one[1] <= other[0] for one, other in pairwise(ordered))
    # Branches share rows: far fewer than one for each.
    assert drawn["rows"] == len(bars) < 40


@pytest.mark.skipif(
    "MIDSTREAM_SCREENSHOT" not in os.environ, reason="set MIDSTREAM_SCREENSHOT to the path of a picture to take one"
)
def test_screenshot(browser: Browser, server_url: str) -> None:
    """Of the server at MIDSTREAM_SCREENSHOT_URL where that is set, such as one with the default model."""
    url = os.environ.get("MIDSTREAM_SCREENSHOT_URL", server_url)
    page = browser.new_page(viewport={"width": 1280, "height": 900}, color_scheme="light")
    save_screenshot(Playground(page, url).connected(), os.environ["MIDSTREAM_SCREENSHOT"])
    page.close()
