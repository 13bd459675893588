"""ComfyUI's page in a headless Chromium, driven by playwright."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

START_MS, RUN_MS, SOON_MS = 60_000, 300_000, 20_000
WINDOW = {"width": 1600, "height": 1000}
FLAGS = (
    "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update",
    "--disable-sync", "--no-first-run",
)  # fmt: skip
CHROMIUM = ("chromium", "chromium-browser", "google-chrome")

# What the page made of the workflow that is open. Two nodes overlap where their boxes, titles included, do.
# Where letters would be too small, the page leaves all text away.
_GRAPH = """() => {
    const graph = app.graph, links = [...graph.links.values()], boxes = graph.nodes.map(n => n.boundingRect);
    const wrong = links.filter(link => {
        const output = graph.getNodeById(link.origin_id)?.outputs[link.origin_slot];
        const input = graph.getNodeById(link.target_id)?.inputs[link.target_slot];
        return !output || !input || !output.links.includes(link.id) || input.link !== link.id
            || !LiteGraph.isValidConnection(output.type, input.type);
    });
    const apart = (a, b) => a[0] + a[2] <= b[0] || b[0] + b[2] <= a[0] || a[1] + a[3] <= b[1]
        || b[1] + b[3] <= a[1];
    return {
        nodes: graph.nodes.length,
        links: links.length,
        unknown: graph.nodes.filter(n => !(n.type in LiteGraph.registered_node_types)).map(n => n.type),
        in_error: graph.nodes.filter(n => n.has_errors).map(n => n.type),
        wrong_links: wrong.map(link => link.id),
        unreadable: LiteGraph.NODE_TEXT_SIZE * app.canvas.ds.scale < app.canvas.min_font_size_for_lod,
        overlapping: graph.nodes.flatMap((node, i) => graph.nodes.slice(i + 1)
            .filter((_, j) => !apart(boxes[i], boxes[i + 1 + j])).map(other => [node.title, other.title])),
    };
}"""

# Where the groups lie on the screen: left, top, width, height.
_BOX = """() => {
    const { scale, offset } = app.canvas.ds, place = app.canvas.canvas.getBoundingClientRect();
    const edges = app.graph.groups.map(({ pos: [x, y], size: [w, h] }) => [x, y, x + w, y + h]);
    const edge = (number, extreme) => extreme(...edges.map(box => box[number]));
    const [left, top, right, bottom] = [edge(0, Math.min), edge(1, Math.min), edge(2, Math.max),
        edge(3, Math.max)];
    return [place.x + (left + offset[0]) * scale, place.y + (top + offset[1]) * scale,
        (right - left) * scale, (bottom - top) * scale];
}"""

_QUEUE = """() => new Promise(resolve => {
    for (const kind of ["execution_success", "execution_error", "execution_interrupted"]) {
        app.api.addEventListener(kind, event => resolve([kind, event.detail]), { once: true });
    }
    app.queuePrompt(0).then(sent => { if (!sent) { resolve(["refused", app.lastNodeErrors]); } });
})"""


def find_chromium() -> str | None:
    """A Chromium of the system; playwright's own would be a download."""
    return next(filter(None, map(shutil.which, CHROMIUM)), None)


class Page:
    """An open page of one server. `tab` is playwright's; `broken` collects errors that scripts threw."""

    def __init__(self, tab: Any, url: str, pictures: Path):
        self.tab, self.pictures, self.broken = tab, pictures, []
        tab.on("pageerror", lambda error: self.broken.append(str(error)))
        tab.goto(url)
        tab.wait_for_function("() => window.app?.graph && window.app.extensionManager", timeout=START_MS)

    def open(self, workflow: dict) -> dict:
        """A workflow as from a file; what the page made of it."""
        self.tab.evaluate("workflow => app.loadGraphData(workflow)", workflow)
        return self.graph(len(workflow["nodes"]))

    def open_template(self, name: str, nodes: int) -> dict:
        """The pack's template `name` by clicks; what the page made of it once it has as many nodes."""
        self.clear()
        self.tab.get_by_text("Templates", exact=True).first.click()
        self.tab.get_by_text("lofa", exact=True).first.click()
        self.tab.get_by_test_id(f"template-workflow-{name}").click()
        return self.graph(nodes)

    def graph(self, nodes: int) -> dict:
        """The open workflow, as `_GRAPH` says, once it has `nodes` nodes and has been drawn."""
        self.tab.wait_for_function("count => app.graph.nodes.length === count", arg=nodes, timeout=SOON_MS)
        # A node has its place and size once it was drawn, and combo boxes are checked shortly after.
        self.tab.wait_for_function("() => app.graph.nodes.every(n => n.boundingRect[2] > 0)", timeout=SOON_MS)
        self.tab.wait_for_timeout(300)
        return self.tab.evaluate(_GRAPH)

    def refresh(self) -> None:
        """Have the page look for files that came since it was opened."""
        self.tab.evaluate("() => app.refreshComboInNodes()")

    def set(self, kind: str, widget: str, value: object) -> None:
        """A widget's value in every node of a kind."""
        self.tab.evaluate(
            "([kind, widget, value]) => app.graph.nodes.filter(n => n.type === kind).forEach("
            "n => { n.widgets.find(w => w.name === widget).value = value; })",
            [kind, widget, value],
        )

    def clear(self) -> None:
        self.tab.evaluate("() => app.graph.clear()")

    def add(self, kind: str) -> None:
        """A new node of this kind alone in the graph, selected."""
        self.clear()
        self.tab.evaluate(
            "kind => { const node = LiteGraph.createNode(kind); node.pos = [300, 300]; app.graph.add(node);"
            " app.canvas.selectNode(node); }",
            kind,
        )

    def help(self, kind: str) -> str:
        """The text in the help panel of a new node of this kind."""
        self.add(kind)
        panel = self.tab.locator(".node-help-content")
        if not panel.count():
            self.tab.get_by_test_id("info-button").click()
        panel.locator("h1").first.wait_for(timeout=SOON_MS)
        return panel.inner_text()

    def run(self) -> dict:
        """Queue the open workflow and wait; what its nodes show, by node id."""
        self.tab.set_default_timeout(RUN_MS)
        kind, detail = self.tab.evaluate(_QUEUE)
        self.tab.set_default_timeout(SOON_MS)
        assert kind == "execution_success", (kind, detail.get("exception_message", detail))
        self.tab.wait_for_timeout(500)
        return self.tab.evaluate("() => app.nodeOutputs")

    def screenshot(self, name: str) -> Path:
        self.pictures.mkdir(parents=True, exist_ok=True)
        path = self.pictures / f"{name}.png"
        self.tab.screenshot(path=path)
        return path

    def picture_of_graph(self, name: str) -> Path:
        """The open workflow's nodes and groups alone."""
        path, box = self.pictures / f"{name}_graph.png", self.tab.evaluate(_BOX)
        self.tab.screenshot(path=path, clip=dict(zip(("x", "y", "width", "height"), box, strict=True)))
        return path


@contextmanager
def opened(playwright: Any, chromium: str, url: str, pictures: Path) -> Iterator[Page]:
    """A page that nothing outside this machine is asked from, and its browser closed at the end."""
    browser = playwright.chromium.launch(executable_path=chromium, args=list(FLAGS))
    try:
        tab = browser.new_context(viewport=WINDOW).new_page()
        tab.route(lambda address: not address.startswith(url), lambda route: route.abort())
        tab.set_default_timeout(SOON_MS)
        yield Page(tab, url, pictures)
    finally:
        browser.close()
