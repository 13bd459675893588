"""What can be said of the nodes without ComfyUI: who imports what, and that the files beside them agree."""

import ast
import json
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
NODES = ROOT / "nodes"
HOST_FILES = {"host.py", "host_guidance.py", "host_miniature.py"}
WORKFLOWS = sorted((ROOT / "workflows").glob("*.json"))


def trees() -> dict[str, ast.Module]:
    return {path.name: ast.parse(path.read_text(encoding="utf-8")) for path in NODES.glob("*.py")}


def schema_calls() -> dict[str, ast.Call]:
    """The io.Schema(...) of every node, by node id; nodes that are alike get theirs from a function."""
    calls = {}
    for tree in trees().values():
        makers = {
            function.name: (call, [argument.arg for argument in function.args.args])
            for function in tree.body
            if isinstance(function, ast.FunctionDef)
            for call in ast.walk(function)
            if is_schema(call)
        }
        for call in (part for node in tree.body if isinstance(node, ast.ClassDef) for part in ast.walk(node)):
            if not isinstance(call, ast.Call):
                continue
            schema, names = makers.get(ast.unparse(call.func), (call, []))
            if is_schema(schema):
                node_id = next(word.value for word in schema.keywords if word.arg == "node_id")
                given = dict(zip(names, call.args, strict=False))
                calls[ast.literal_eval(given.get(ast.unparse(node_id), node_id))] = schema
    return calls


def is_schema(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and ast.unparse(node.func) == "io.Schema"


def test_only_the_host_files_touch_comfyui_internals():
    internals = {"comfy", "comfy_extras", "comfy_execution", "folder_paths", "nodes", "server", "execution"}
    for name, tree in trees().items():
        modules = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                modules |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                modules.add(node.module.split(".")[0])
        assert name in HOST_FILES or not modules & internals, name


def test_no_node_places_anything_by_itself():
    """ComfyUI says where: no `.cuda()`, no device by name, no `.to("cuda")`."""
    for name, tree in trees().items():
        for node in ast.walk(tree):
            assert not (isinstance(node, ast.Attribute) and node.attr in {"cuda", "xpu", "mps"}), name
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                assert not node.value.startswith(("cuda", "xpu", "mps")), (name, node.value)


def test_every_node_class_is_in_the_extension():
    listed = {
        ast.unparse(entry)
        for node in ast.walk(trees()["__init__.py"])
        if isinstance(node, ast.Return) and isinstance(node.value, ast.List)
        for entry in node.value.elts
    }
    defined = {
        node.name
        for tree in trees().values()
        for node in tree.body
        if isinstance(node, ast.ClassDef) and [ast.unparse(base) for base in node.bases] == ["io.ComfyNode"]
    }
    assert listed == defined and len(defined) == len(schema_calls())


def test_every_node_has_a_name_a_description_and_aliases():
    for node_id, call in schema_calls().items():
        given = {keyword.arg for keyword in call.keywords}
        assert node_id.startswith("LoFA")
        assert given >= {"display_name", "category", "description", "search_aliases", "inputs", "outputs"}


def test_every_node_has_a_help_page_and_an_entry_in_the_locale():
    pages = {path.stem for path in (NODES / "web/docs").glob("*.md")}
    locale = json.loads((ROOT / "locales/en/nodeDefs.json").read_text(encoding="utf-8"))
    assert pages == set(locale) == set(schema_calls())


def test_a_help_page_names_every_socket_and_widget():
    locale = json.loads((ROOT / "locales/en/nodeDefs.json").read_text(encoding="utf-8"))
    for node_id, entry in locale.items():
        page = (NODES / f"web/docs/{node_id}.md").read_text(encoding="utf-8")
        said = page.lower().replace("_", " ")
        names = [*entry.get("inputs", {}), *(output["name"] for output in entry.get("outputs", {}).values())]
        assert [name for name in names if name.lower().replace("_", " ") not in said] == [], node_id


def test_every_template_has_a_small_square_picture():
    pictures = sorted((ROOT / "workflows").glob("*.jpg"))
    assert [path.stem for path in pictures] == [path.stem for path in WORKFLOWS]
    for path in pictures:
        with Image.open(path) as picture:
            assert picture.format == "JPEG" and picture.width == picture.height >= 256, path.name
        assert path.stat().st_size < 60_000, path.name


def test_a_template_that_loads_models_offers_them_for_download():
    """All but the hypernetworks that nobody has published; the note says where those come from."""
    loaders = {"UNETLoader", "CLIPLoader", "VAELoader", "CheckpointLoaderSimple", "CLIPVisionLoader"}
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for path in WORKFLOWS:
        for node in json.loads(path.read_text(encoding="utf-8"))["nodes"]:
            offered = node["properties"].get("models", [])
            if node["type"] in loaders:
                assert [model["name"] for model in offered] == node["widgets_values"][:1], path.name
            for model in offered:
                assert f"`{model['name']}`" in readme and f"`models/{model['directory']}`" in readme, model


def test_workflows_are_whole():
    assert WORKFLOWS
    for path in WORKFLOWS:
        workflow = json.loads(path.read_text(encoding="utf-8"))
        nodes = {node["id"]: node for node in workflow["nodes"]}
        ours = {node["type"] for node in nodes.values() if node["type"].startswith("LoFA")}
        assert ours and ours <= set(schema_calls()), path.name
        for link, source, output, target, entry, kind in workflow["links"]:
            assert link in nodes[source]["outputs"][output]["links"], (path.name, link)
            assert nodes[target]["inputs"][entry]["link"] == link, (path.name, link)
            assert nodes[source]["outputs"][output]["type"] == kind, (path.name, link)
        linked = {
            slot["link"]
            for node in nodes.values()
            for slot in node.get("inputs", [])
            if slot["link"] is not None
        }
        assert linked == {link[0] for link in workflow["links"]}, path.name
