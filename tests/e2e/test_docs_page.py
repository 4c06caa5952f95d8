"""`/docs` in real Chromium: it shows everything, streams what it tries, and asks nobody else for anything."""

import re
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import httpx
import pytest

from tests.e2e.chromium import Page, chromium
from tests.e2e.running import RunningServer

CHAT = "post_v1_chat_completions"


@pytest.fixture
async def page(tmp_path: Path) -> AsyncIterator[Page]:
    async with chromium(tmp_path / "profile") as opened:
        yield opened


async def opened(page: Page, server: RunningServer, query: str = "", hash: str = "") -> Page:
    await page.open(f"{server.url}/docs{query}{hash}")
    await page.until("document.querySelector('article')")
    return page


async def test_every_operation_and_schema_is_shown(server: RunningServer, page: Page) -> None:
    async with httpx.AsyncClient() as http:
        document = (await http.get(f"{server.url}/openapi.json")).json()
    operations = {
        operation["operationId"]: f"{method.upper()} {path}"
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    }
    await opened(page, server)

    shown = await page.value(
        """Object.fromEntries([...document.querySelectorAll("article")].map((article) =>
          [article.id, [".method", ".path"].map((part) => article.querySelector(part).innerText).join(" ")]
        ))"""
    )
    listed = await page.value("[...document.querySelectorAll('nav a')].map((link) => link.hash.slice(1))")
    schemas = await page.value(
        "[...document.querySelectorAll('#schemas > details > summary')].map((summary) => summary.textContent)"
    )

    assert shown == operations
    assert sorted(listed) == sorted(operations)
    assert schemas == sorted(document["components"]["schemas"])
    assert page.complaints == []


async def test_every_operation_and_schema_can_be_unfolded(server: RunningServer, page: Page) -> None:
    """Everything that the page can draw is drawn once."""
    await opened(page, server)
    num_opened = await page.value(
        """(async () => {
          let count = 0;
          for (let depth = 0; depth < 4; depth++) {
            const closed = [...document.querySelectorAll("details:not([open])")];
            for (const details of closed) details.open = true;
            count += closed.length;
            await new Promise((drawn) => setTimeout(drawn));
          }
          return count;
        })()"""
    )
    text = await page.value("document.querySelector('main').innerText")

    assert num_opened > 100
    for expected in (
        "x-compute-time",
        "top_logprobs",
        "Not served",
        "text/event-stream",
        "adapter_not_found",
    ):
        assert expected in text
    assert "undefined" not in text
    assert "[object Object]" not in text
    assert page.complaints == []


async def test_nothing_is_asked_of_anybody_else(server: RunningServer, page: Page) -> None:
    await opened(page, server, hash=f"#{CHAT}")
    await send(page, CHAT)

    assert page.requested == [
        f"{server.url}/docs",
        f"{server.url}/openapi.json",
        f"{server.url}/v1/chat/completions",
    ]
    assert page.complaints == []


async def send(page: Page, operation: str) -> str:
    """Send the form of an operation; what it shows in the end."""
    form = f"document.getElementById('{operation}').querySelector('form')"
    await page.until(form)
    await page.value(f"{form}.querySelector('.send').click()")
    await page.until(f"{form}.querySelector('.status').textContent.includes('complete')")
    return str(await page.value(f"{form}.querySelector('.output').textContent"))


async def test_answers_are_shown_while_they_stream(server: RunningServer, page: Page) -> None:
    await opened(page, server, hash=f"#{CHAT}")
    await page.until(f"document.querySelector('#{CHAT} form')")
    await page.value(
        f"""(() => {{
          const form = document.querySelector("#{CHAT} form");
          const body = form.querySelector("textarea");
          const longer = {{stream: true, max_tokens: 1000, ignore_eos: true}};
          body.value = JSON.stringify({{...JSON.parse(body.value), ...longer}});
          window.lengths = [];
          new MutationObserver(() => lengths.push(form.querySelector(".output").textContent.length))
            .observe(form.querySelector(".output"), {{childList: true}});
        }})()"""
    )
    output = await send(page, CHAT)
    lengths = await page.value("lengths")
    status = await page.value(f"document.querySelector('#{CHAT} .status').textContent")

    assert output.startswith("data: {")
    assert output.endswith("data: [DONE]\n\n")
    assert len(set(lengths)) > 5, "it came in one piece"
    assert re.match(r"200 OK after \d+ ms, \d+ reads, complete after \d+ ms", status)


async def test_stream_can_be_stopped(server: RunningServer, page: Page) -> None:
    await opened(page, server, hash=f"#{CHAT}")
    form = f"document.querySelector('#{CHAT} form')"
    await page.until(form)
    await page.value(
        f"""{form}.querySelector("textarea").value = JSON.stringify({{
          messages: [{{role: "user", content: "hi"}}], stream: true, max_tokens: 1500, ignore_eos: true}})"""
    )
    await page.value(f"{form}.querySelector('.send').click()")
    await page.until(f"{form}.querySelector('.output').textContent.includes('data: ')")
    await page.value(f"{form}.querySelector('.stop').click()")
    await page.until(f"{form}.querySelector('.status').textContent.startsWith('stopped')")

    server.wait_until_idle()


async def test_page_is_used_with_the_keyboard_alone(server: RunningServer, page: Page) -> None:
    await opened(page, server)
    await page.press("/")
    assert await page.value("document.activeElement.id") == "find"
    for letter in "under way":
        await page.press(letter)
    shown = "[...document.querySelectorAll('article:not([hidden])')].map((article) => article.id)"
    await page.until(f"({shown}).length === 1")
    assert await page.value(shown) == ["get_load"]

    for _ in range(30):
        await page.press("Tab")
        if await page.value("document.activeElement.matches('#get_load summary')"):
            break
    await page.press("Enter")
    await page.until("document.querySelector('#get_load form')")
    for _ in range(30):
        await page.press("Tab")
        if await page.value("document.activeElement.matches('#get_load .send')"):
            break
    outline = await page.value("getComputedStyle(document.activeElement).outlineStyle")
    await page.press("Enter")
    await page.until("document.querySelector('#get_load .output').textContent.includes('server_load')")

    assert outline == "solid"
    assert page.complaints == []


async def test_page_is_dark_for_those_who_prefer_that(server: RunningServer, page: Page) -> None:
    grounds = []
    for scheme in ("light", "dark"):
        await page.prefer(scheme)
        await opened(page, server)
        grounds.append(await page.value("getComputedStyle(document.body).backgroundColor"))

    assert grounds == ["rgb(255, 255, 255)", "rgb(20, 23, 26)"]


async def test_key_in_the_address_opens_the_page_and_is_sent_with_what_it_tries(
    launch: Callable[..., RunningServer], page: Page
) -> None:
    server = launch("--api-key", "sk-1 & more")
    await opened(page, server, query="?api_key=sk-1%20%26%20more", hash="#get_v1_models")

    assert '"object": "list"' in await send(page, "get_v1_models")
    assert page.complaints == []
