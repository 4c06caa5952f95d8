"""The playground in real Chromium: every control, on a phone and at 200 %, against a real server."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from playwright.sync_api import Browser, Page, Route, expect

from server.embedded.location import adapters_dir
from tests.e2e.cutting import road_to
from tests.e2e.running import RunningServer

PHONE = {"width": 390, "height": 844}
AT_200_PERCENT = {"width": 640, "height": 400}


@pytest.fixture
def page(browser: Browser, server: RunningServer) -> Iterator[Page]:
    """The playground, ready; at the end nothing may have gone wrong in it, nor anybody else been asked."""
    with opened(browser, server.url) as shown:
        yield shown


@contextmanager
def opened(browser: Browser, url: str, **options: Any) -> Iterator[Page]:
    context = browser.new_context(**options)
    page = context.new_page()
    complaints: list[str] = []
    asked: list[str] = []
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("console", lambda said: complaints.append(said.text) if said.type == "error" else None)
    page.on("request", lambda request: asked.append(request.url))
    page.goto(f"{url}/")
    expect(page.locator("#server .dot.ready")).to_be_visible()
    yield page
    context.close()
    expected = re.compile(
        r"status of 40[0-9]|ERR_INCOMPLETE_CHUNKED_ENCODING|ERR_EMPTY_RESPONSE|ERR_CONNECTION"
    )
    assert [text for text in complaints if not expected.search(text)] == []
    assert {re.sub(r"^(data:).*", r"\1", each) for each in asked if not each.startswith(url)} <= {"data:"}


def pick(page: Page, box: str, name: str) -> None:
    page.get_by_role("combobox", name=box).click()
    page.get_by_role("combobox", name=box).fill(name)
    page.get_by_role("option", name=re.compile(f"^{name}")).first.wait_for()
    page.keyboard.press("Enter")
    if box == "Adapter":
        expect(page.get_by_role("combobox", name=box)).to_have_value(name)


def send(page: Page, text: str) -> None:
    page.get_by_label("Message").fill(text)
    page.keyboard.press("Enter")


def answer(page: Page, number: int = -1) -> Any:
    return page.locator("#messages article.answer").nth(number)


def finished(page: Page, number: int = -1) -> None:
    expect(answer(page, number)).to_have_attribute("aria-busy", "false", timeout=30_000)


def until_longer(page: Page, length: int) -> None:
    """Wait until so much of the answer is there."""
    expect(answer(page).locator(".prose")).to_have_text(re.compile(f"[\\s\\S]{{{length},}}"))


def kept(page: Page) -> str:
    """The answer as the browser remembers it."""
    return str(page.evaluate("JSON.parse(localStorage['motet.chat']).turns[1].content"))


def prolong(page: Page, max_tokens: int = 2000) -> None:
    """Answers that do not end by themselves, so that there is time to do something about them."""
    longer = {"ignore_eos": True, "max_tokens": max_tokens, "temperature": 0}
    page.add_init_script(
        f"""const asked = window.fetch;
        window.fetch = (url, options) => {{
          if (String(url).endsWith("/v1/chat/completions")) {{
            const body = {{ ...JSON.parse(options.body), ...{json.dumps(longer)} }};
            options = {{ ...options, body: JSON.stringify(body) }};
          }}
          return asked(url, options);
        }};"""
    )
    page.reload()
    expect(page.locator("#server .dot.ready")).to_be_visible()


def test_a_chat_streams_and_says_what_it_cost(page: Page) -> None:
    pick(page, "Adapter", "pirate")
    send(page, "What is an adapter?")
    finished(page)
    assert len(answer(page).locator(".prose").inner_text()) > 20
    figures = answer(page).locator(".figures").inner_text()
    for expected in (
        "first token",
        "tokens/s",
        "prompt tokens",
        "generated",
        "x-adapter-id pirate",
        "x-compute-time",
    ):
        assert expected in figures
    send(page, "And how do I load one?")
    finished(page, 1)
    assert page.locator("#messages article").count() == 4
    page.get_by_role("button", name="New conversation").click()
    assert page.locator("#messages article").count() == 0
    page.get_by_role("button", name="What is a prefix cache?").click()
    finished(page)


def test_settings_go_with_the_request_and_are_kept(page: Page) -> None:
    page.locator("#settings summary").click()
    page.get_by_label("System prompt").fill("Be brief.")
    page.get_by_label("Temperature").fill("0")
    page.get_by_label("Most tokens").fill("3")
    page.get_by_label("Stop at").fill("zzz")
    page.get_by_label("Seed").fill("7")
    page.get_by_label("Seed").blur()
    with page.expect_request("**/v1/chat/completions") as asked:
        send(page, "What is an adapter?")
    body = asked.value.post_data_json
    assert body["messages"][0] == {"role": "system", "content": "Be brief."}
    assert (body["temperature"], body["max_tokens"], body["seed"], body["stop"]) == (0, 3, 7, "zzz")
    finished(page)
    assert "cut at the most tokens" in answer(page).locator(".figures").inner_text()
    page.reload()
    page.locator("#settings summary").click()
    expect(page.get_by_label("Most tokens")).to_have_value("3")
    finished(page)


def test_stop_frees_the_model_at_once(page: Page, server: RunningServer) -> None:
    prolong(page)
    send(page, "What is an adapter?")
    expect(answer(page).locator(".figures")).to_contain_text("tokens/s")
    page.locator("#stop").click()
    server.wait_until_idle()
    finished(page)
    expect(answer(page).locator(".figures")).to_contain_text("stopped")
    expect(page.locator("#send")).to_be_visible()
    answer(page).get_by_role("button", name="Go on").click()
    expect(answer(page)).to_have_attribute("aria-busy", "true")
    expect(page.locator("#send")).to_be_hidden()
    page.locator("#stop").click()
    server.wait_until_idle()


def test_a_reload_in_the_middle_goes_on_where_it_was(page: Page, server: RunningServer) -> None:
    prolong(page)
    send(page, "What is an adapter?")
    until_longer(page, 80)
    with page.expect_request("**/v1/chat/completions") as asked:
        page.reload()
    body = asked.value.post_data_json
    partial = body["messages"][-1]["content"]
    assert body["messages"][-1]["role"] == "assistant"
    assert len(partial) >= 80
    assert body["continue_final_message"] is True
    expect(answer(page)).to_have_attribute("aria-busy", "true")
    until_longer(page, len(partial) + 40)
    page.locator("#stop").click()
    server.wait_until_idle()
    finished(page)
    assert kept(page).startswith(partial)
    assert len(kept(page)) > len(partial)


def test_a_dropped_connection_is_gone_on_with(browser: Browser, server: RunningServer) -> None:
    with road_to(int(server.url.rpartition(":")[2])) as road, opened(browser, road.url) as page:
        prolong(page)
        send(page, "What is an adapter?")
        until_longer(page, 40)
        with page.expect_request("**/v1/chat/completions") as asked:
            road.cut()
        body = asked.value.post_data_json
        assert body["continue_final_message"] is True
        until_longer(page, len(body["messages"][-1]["content"]) + 40)
        page.locator("#stop").click()
        server.wait_until_idle()
        finished(page)
        assert kept(page).startswith(body["messages"][-1]["content"])


def note_typing(page: Page) -> None:
    """Remember whether the dots of an answer without words are ever shown: they are soon gone again."""
    page.evaluate(
        """new MutationObserver(() => {
          if (document.querySelector("#messages .typing")?.checkVisibility()) window.hasTyped = true;
        }).observe(document.getElementById("messages"), {childList: true, subtree: true})"""
    )


SLOW = {"offline": False, "latency": 400, "downloadThroughput": 20_000, "uploadThroughput": 20_000}
"""A poor mobile connection: milliseconds, bytes a second."""


def test_over_a_slow_network_it_opens_streams_and_stops(browser: Browser, server: RunningServer) -> None:
    """Nothing waits for what is still under way: the first words are there long before the last ones."""
    with opened(browser, server.url) as page:
        network = page.context.new_cdp_session(page)
        network.send("Network.enable")
        network.send("Network.emulateNetworkConditions", SLOW)
        prolong(page)
        note_typing(page)
        send(page, "What is an adapter?")
        expect(answer(page)).to_have_attribute("aria-busy", "true")
        page.wait_for_function("window.hasTyped")
        until_longer(page, 40)
        expect(answer(page)).to_have_attribute("aria-busy", "true")
        page.locator("#stop").click()
        server.wait_until_idle()
        finished(page)
        pick(page, "Adapter", "pirate")
        page.get_by_role("tab", name="Adapters").click()
        expect(page.locator("#adapters")).to_contain_text("haiku")


EVIL = """# A <b>heading</b>

<script>window.taken = 1</script><img src=x onerror="window.taken = 1">

- **strong** and `code <i>`
- [bad](javascript:window.taken=1) and [good](https://example.org/a)

```html
<script>window.taken = 1</script>
```

| a | b |
|---|---|
| 1 | <u>2</u> |
"""


def test_whatever_a_model_says_stays_text(page: Page) -> None:
    def evil(route: Route) -> None:
        chunks = [
            {"choices": [{"index": 0, "delta": {"content": EVIL[at : at + 7]}, "finish_reason": None}]}
            for at in range(0, len(EVIL), 7)
        ]
        chunks.append({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
        body = "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks) + "data: [DONE]\n\n"
        route.fulfill(status=200, headers={"content-type": "text/event-stream"}, body=body)

    page.route("**/v1/chat/completions", evil)
    send(page, "Be evil.")
    finished(page)
    prose = answer(page).locator(".prose")
    assert prose.locator("script, img, b, i, u").count() == 0
    assert page.evaluate("window.taken") is None
    assert [link.get_attribute("href") for link in prose.locator("a").all()] == ["https://example.org/a"]
    assert prose.locator("pre").inner_text() == "<script>window.taken = 1</script>"
    assert prose.locator("strong").inner_text() == "strong"
    assert prose.locator("td").all_inner_texts() == ["1", "<u>2</u>"]
    assert "<img src=x" in prose.inner_text()


def test_an_answer_of_nothing_but_marks_does_not_break_the_page(page: Page) -> None:
    def quotes(route: Route) -> None:
        chunk = {"choices": [{"index": 0, "delta": {"content": ">" * 20_000}, "finish_reason": "stop"}]}
        body = f"data: {json.dumps(chunk)}\n\ndata: [DONE]\n\n"
        route.fulfill(status=200, headers={"content-type": "text/event-stream"}, body=body)

    page.route("**/v1/chat/completions", quotes)
    send(page, "Quote.")
    finished(page)
    expect(page.locator("#send")).to_be_visible()


def test_a_name_that_is_typed_at_once_is_the_one_that_is_picked(page: Page) -> None:
    box = page.get_by_role("combobox", name="Adapter")
    box.click()
    box.fill("pirat")
    box.press("Enter")
    expect(box).to_have_value("pirate")
    page.reload()
    expect(box).to_have_value("pirate")


def test_several_voices_speak_at_once(page: Page) -> None:
    page.get_by_role("tab", name="Compare").click()
    voices = page.locator("#voices li")
    expect(voices).to_have_count(5)
    page.get_by_role("button", name="Without motet").click()
    expect(voices).to_have_count(4)
    pick(page, "Add a voice", "motet")
    expect(voices).to_have_count(5)
    page.get_by_label("One prompt for all of them").fill("What is an adapter?")
    page.get_by_role("button", name="Ask them all").click()
    answers = page.locator("#stage article")
    expect(answers).to_have_count(5)
    for number in range(5):
        expect(answers.nth(number)).to_have_attribute("aria-busy", "false", timeout=30_000)
    named = [
        re.search(r"x-adapter-id (\S+)", text)[1] for text in answers.locator(".figures").all_inner_texts()
    ]  # type: ignore[index]
    assert sorted(named) == ["__base_model__", "german", "haiku", "json", "pirate"]
    assert len({one.inner_text() for one in answers.locator(".prose").all()}) == 5
    expect(page.locator("#compare-sum")).to_contain_text("5 have spoken")


def test_adapters_are_found_added_used_and_removed(
    browser: Browser, launch: Callable[..., RunningServer], tmp_path: Path
) -> None:
    running = launch("--port", "0")
    with opened(browser, running.url) as page:
        page.get_by_role("tab", name="Adapters").click()
        rows = page.locator("#adapter-rows tr")
        expect(rows).to_have_count(4)
        page.get_by_label("Find").fill("pir")
        expect(rows).to_have_count(1)
        rows.first.get_by_role("button", name="Pin pirate").click()
        expect(rows.first.get_by_role("button", name="Unpin pirate")).to_be_visible()
        expect(rows.first).to_contain_text("pinned")
        rows.first.get_by_role("button", name="Unpin pirate").click()
        expect(rows.first).not_to_contain_text("pinned")
        page.get_by_label("Find").fill("")

        source = adapters_dir() / "haiku"
        page.locator("#upload-files").set_input_files([source / "adapter_config.json"])
        expect(page.locator("#upload-list")).to_contain_text("adapter_model.safetensors is missing")
        expect(page.get_by_role("button", name="Upload")).to_be_disabled()
        page.locator("#upload-files").set_input_files(sorted(source.iterdir()))
        page.get_by_label("Name", exact=True).fill("poet")
        page.get_by_role("button", name="Upload").click()
        expect(page.locator("#upload-state")).to_contain_text("poet is there")
        expect(rows).to_have_count(5)
        page.get_by_label("Name", exact=True).fill("poet")
        (tmp_path / "adapter_config.json").write_text("{}")
        (tmp_path / "adapter_model.safetensors").write_bytes(b"nonsense")
        page.locator("#upload-files").set_input_files(sorted(tmp_path.iterdir()))
        page.get_by_role("button", name="Upload").click()
        expect(page.locator("#upload-state")).not_to_contain_text("Uploading")
        expect(page.locator("#upload-state")).not_to_be_empty()
        expect(rows).to_have_count(5)

        page.get_by_role("button", name="Talk to poet").click()
        send(page, "What is an adapter?")
        finished(page)
        assert "x-adapter-id poet" in answer(page).locator(".figures").inner_text()
        page.get_by_role("tab", name="Adapters").click()
        page.get_by_role("button", name="Remove poet").click()
        page.locator("#sure").get_by_role("button", name="Cancel").click()
        expect(rows).to_have_count(5)
        page.get_by_role("button", name="Remove poet").click()
        page.locator("#sure").get_by_role("button", name="Remove").click()
        expect(rows).to_have_count(4)
    assert httpx.get(f"{running.url}/v1/models/poet").status_code == 404


def test_files_can_be_dropped(page: Page) -> None:
    page.get_by_role("tab", name="Adapters").click()
    page.evaluate(
        """() => {
          const carried = new DataTransfer();
          for (const name of ["adapter_config.json", "adapter_model.safetensors", "README.md"])
            carried.items.add(new File(["{}"], name));
          const drop = { dataTransfer: carried, bubbles: true, cancelable: true };
          document.getElementById("upload").dispatchEvent(new DragEvent("drop", drop));
        }"""
    )
    expect(page.locator("#upload-list li")).to_have_count(2)
    expect(page.locator("#upload-state")).to_contain_text("1 other file is not needed")


def test_a_name_that_was_seen_is_picked_before_the_server_has_looked_for_it(page: Page) -> None:
    page.route(re.compile("search=pirate"), lambda route: None)  # never answered
    page.get_by_role("combobox", name="Adapter").click()
    page.get_by_role("option", name=re.compile("^pirate")).wait_for()  # of the list of all
    pick(page, "Adapter", "pirate")
    send(page, "What is an adapter?")
    finished(page)
    expect(answer(page).locator(".figures")).to_contain_text("x-adapter-id pirate")


def test_live_shows_what_the_server_is_doing(page: Page, server: RunningServer) -> None:
    prolong(page, max_tokens=4000)
    pick(page, "Adapter", "pirate")
    send(page, "What is an adapter?")
    expect(answer(page).locator(".figures")).to_contain_text("tokens/s")
    page.get_by_role("tab", name="Live").click()
    expect(page.locator("#legend")).to_contain_text("pirate 1")
    expect(page.locator("#chart-batch")).to_have_attribute("aria-label", re.compile("pirate 1"))
    expect(page.locator("#parts")).to_contain_text("%")
    expect(page.locator("#numbers")).to_contain_text("Tokens a second")
    page.get_by_role("tab", name="Chat").click()
    page.locator("#stop").click()
    server.wait_until_idle()


def test_a_key_is_asked_for_where_one_is_set(browser: Browser, launch: Callable[..., RunningServer]) -> None:
    running = launch("--port", "0", "--api-key", "sk-right")
    context = browser.new_context()
    page = context.new_page()
    page.goto(f"{running.url}/")
    page.locator("#key").fill("sk-wrong")
    page.get_by_role("button", name="Use it").click()
    expect(page.locator("#key-problem")).to_contain_text("API key")
    page.locator("#key").fill("sk-right")
    page.get_by_label("keep it in this browser").check()
    page.get_by_role("button", name="Use it").click()
    expect(page.locator("#server .dot.ready")).to_be_visible()
    send(page, "What is an adapter?")
    finished(page)
    page.reload()
    expect(page.locator("#server .dot.ready")).to_be_visible()
    assert not page.locator("#key-dialog").is_visible()
    context.close()


@pytest.mark.parametrize("language", ["curl", "Python", "JavaScript"])
def test_a_request_can_be_taken_along(browser: Browser, server: RunningServer, language: str) -> None:
    allowed = ["clipboard-read", "clipboard-write"]
    with opened(browser, server.url, permissions=allowed) as page:
        pick(page, "Adapter", "json")
        send(page, "It's \"true\" & 'null' that 5\" is true?")
        finished(page)
        answer(page).get_by_role("button", name=f"Copy as {language}").click()
        text = page.evaluate("navigator.clipboard.readText()")
    assert run_copied(language, text).strip()


def run_copied(language: str, text: str) -> str:
    """What the program says that was copied."""
    commands = {
        "curl": ["bash", "-c", text],
        "Python": [sys.executable, "-c", text],
        "JavaScript": ["node", "--input-type=module", "-e", text],
    }
    if language == "JavaScript" and shutil.which("node") is None:
        pytest.skip("no Node.js here")
    done = subprocess.run(commands[language], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("size", [PHONE, AT_200_PERCENT], ids=["phone", "200 percent"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_is_cut_off(
    browser: Browser, server: RunningServer, size: dict[str, int], scheme: str
) -> None:
    with opened(browser, server.url, viewport=size, color_scheme=scheme) as page:
        send(page, "What is an adapter?")
        finished(page)
        for view in ("Chat", "Compare", "Adapters", "Live"):
            page.get_by_role("tab", name=view).click()
            page.wait_for_timeout(0)
            wide = page.evaluate("document.documentElement.scrollWidth")
            assert wide <= size["width"], view
        page.get_by_role("tab", name="Chat").click()
        expect(page.get_by_label("Message")).to_be_in_viewport()
        expect(page.locator("#send")).to_be_in_viewport()


def test_the_keyboard_reaches_everything(page: Page) -> None:
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "tab-chat"
    for expected in ("compare", "adapters", "live", "chat"):
        page.keyboard.press("ArrowRight")
        assert page.evaluate("document.activeElement.id") == f"tab-{expected}"
        assert page.locator(f"#{expected}").is_visible()
    box = page.get_by_role("combobox", name="Adapter")
    box.focus()
    page.get_by_role("option").first.wait_for()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowDown")
    assert page.get_by_role("option", selected=True).count() == 1
    page.keyboard.press("Escape")
    expect(page.get_by_role("option")).to_have_count(0)


def test_the_front_page_is_for_people_and_the_banner_for_programs(server: RunningServer) -> None:
    page = httpx.get(f"{server.url}/", headers={"accept": "text/html,*/*;q=0.8"})
    banner = httpx.get(f"{server.url}/", headers={"accept": "*/*"})
    assert page.headers["content-type"].startswith("text/html")
    assert len(page.content) <= 150_000
    assert banner.text == "Ollama is running"
    assert all("Accept" in answer.headers["vary"] for answer in (page, banner))
    assert httpx.get(f"{server.url}/playground").text == page.text
