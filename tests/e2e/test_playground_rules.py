"""The playground by the rules of axe-core: every view, light and dark. `make test-web`."""

from pathlib import Path

import pytest
from playwright.sync_api import Browser, expect

from tests.e2e.running import RunningServer

pytestmark = pytest.mark.web

AXE = Path(__file__).parent / "node/node_modules/axe-core/axe.min.js"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("view", ["Chat", "Compare", "Adapters", "Live"])
def test_no_rule_is_broken(browser: Browser, server: RunningServer, view: str, scheme: str) -> None:
    context = browser.new_context(color_scheme=scheme, bypass_csp=True)
    page = context.new_page()
    page.goto(f"{server.url}/")
    expect(page.locator("#server .dot.ready")).to_be_visible()
    page.get_by_label("Message").fill("What is an adapter?")
    page.keyboard.press("Enter")
    expect(page.locator("article.answer")).to_have_attribute("aria-busy", "false", timeout=30_000)
    page.locator("#settings summary").click()
    page.get_by_role("tab", name=view).click()
    page.add_script_tag(content=AXE.read_text())
    found = page.evaluate("axe.run(document)")
    context.close()
    broken = {rule["id"]: [node["html"] for node in rule["nodes"]] for rule in found["violations"]}
    assert broken == {}
    assert len(found["passes"]) > 20
