// Response Heatmap: the button "Look closer" opens a dialog with every layer's map, and one of them large.
import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";

const NODE = "LoFAResponseHeatmap";
const BUTTON = "Look closer";
const LARGE = 400; // pixels of the one map
const GRID = { width: 320, height: 460, left: 30, top: 34, gap: 1 };

const STYLE = `
.lofa-heatmap { background: var(--comfy-menu-bg, #2b2b2b); color: var(--input-text, #ddd);
  border: 1px solid var(--border-color, #555); border-radius: 8px; padding: 16px; max-width: 96vw;
  font: 14px/1.5 system-ui, sans-serif; pointer-events: auto; }
.lofa-heatmap::backdrop { background: rgb(0 0 0 / 60%); }
.lofa-heatmap h2 { margin: 0 0 8px; font-size: 16px; }
.lofa-heatmap .lofa-columns { display: flex; gap: 24px; align-items: flex-start; }
.lofa-heatmap .lofa-maps { display: flex; gap: 16px; }
.lofa-heatmap figure { margin: 0; }
.lofa-heatmap figure canvas { image-rendering: pixelated; width: min(400px, 27vw); }
.lofa-heatmap .lofa-scale { display: flex; align-items: center; gap: 8px; }
.lofa-heatmap .lofa-scale span { width: 160px; height: 10px; background: linear-gradient(to right,
  #440154, #472c7a, #3b518b, #2c718e, #21908d, #27ad81, #5cc863, #aadc32, #fde725); }
.lofa-heatmap .lofa-grid { cursor: pointer; outline-offset: 4px; }
.lofa-heatmap dl { display: grid; grid-template-columns: max-content auto; gap: 0 16px; margin: 12px 0;
  max-width: 320px; }
.lofa-heatmap dt { opacity: 0.7; }
.lofa-heatmap dd { margin: 0; font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
`;

/** An element with properties, and children or a text. */
function element(tag, properties = {}, ...children) {
    const made = Object.assign(document.createElement(tag), properties);
    made.append(...children);
    return made;
}

const percent = (share) => `${(100 * share).toFixed(1)}%`;

async function picture({ filename, subfolder, type }) {
    const image = new Image();
    image.src = api.apiURL(`/view?${new URLSearchParams({ filename, subfolder, type })}`);
    await image.decode();
    return image;
}

/** Draws the tile of layer `number` of a picture into a rectangle of a canvas. */
function drawTile(context, image, { side, columns }, number, x, y, width, height) {
    const column = number % columns;
    const row = Math.floor(number / columns);
    context.drawImage(image, column * side, row * side, side, side, x, y, width, height);
}

/** Where each layer's small map lies: a row for each depth, a column for each kind. */
function places(layers) {
    const kinds = [...new Set(layers.map((layer) => layer.kind))];
    const depths = [...new Set(layers.map((layer) => layer.depth))];
    const width = (GRID.width - GRID.left) / kinds.length;
    const height = Math.min(width, (GRID.height - GRID.top) / depths.length);
    const cells = layers.map((layer) => ({ row: depths.indexOf(layer.depth), column: kinds.indexOf(layer.kind) }));
    return { kinds, depths, width, height, cells };
}

function drawGrid(canvas, image, tiles, grid, chosen) {
    const context = canvas.getContext("2d");
    const { kinds, depths, width, height, cells } = grid;
    context.clearRect(0, 0, canvas.width, canvas.height);
    context.fillStyle = getComputedStyle(canvas).color;
    context.font = "11px system-ui, sans-serif";
    context.textAlign = "center";
    kinds.forEach((kind, column) => {
        const [group, ...rest] = kind.split(".");
        const middle = GRID.left + (column + 0.5) * width;
        if (kinds.findIndex((other) => other.startsWith(`${group}.`)) === column) {
            context.textAlign = "left";
            context.fillText(group, GRID.left + column * width, 11);
            context.textAlign = "center";
        }
        context.fillText(rest.join(".").replace(/^to_/, "").replace(/\.0$/, ""), middle, 27);
    });
    context.textAlign = "right";
    const every = Math.ceil(12 / height); // so that the numbers do not touch
    depths.forEach((depth, row) => {
        if (row % every === 0) {
            context.fillText(depth, GRID.left - 6, GRID.top + row * height + Math.min(height / 2 + 4, 10));
        }
    });
    cells.forEach(({ row, column }, number) => {
        const x = GRID.left + column * width;
        const y = GRID.top + row * height;
        drawTile(context, image, tiles, number, x, y, width - GRID.gap, Math.max(1, height - GRID.gap));
    });
    const { row, column } = cells[chosen];
    context.strokeStyle = "#ff5a36";
    context.lineWidth = 2;
    context.strokeRect(GRID.left + column * width - 1, GRID.top + row * height - 1, width + 1, height + 1);
}

function figures(layer) {
    const rows = [
        ["layer", layer.name],
        ["weights", layer.shape.join(" x ")],
        ["adapted weights", percent(layer.share)],
    ];
    if (layer.second_share !== null) {
        rows.push(["in the second", percent(layer.second_share)], ["cosine of both", layer.cosine.toFixed(3)]);
    }
    return rows.flatMap(([name, value]) => [
        element("dt", { textContent: name }),
        element("dd", { textContent: value }),
    ]);
}

function largeMap(caption) {
    const canvas = element("canvas", { width: LARGE, height: LARGE });
    return { canvas, figure: element("figure", {}, element("figcaption", { textContent: caption }), canvas) };
}

/** The layer beside the chosen one that an arrow key means; the chosen one where there is none. */
function neighbour(cells, chosen, key) {
    const step = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[key];
    const wanted = step && { row: cells[chosen].row + step[0], column: cells[chosen].column + step[1] };
    const found = wanted
        ? cells.findIndex(({ row, column }) => row === wanted.row && column === wanted.column)
        : -1;
    return found < 0 ? chosen : found;
}

function fillDialog(dialog, images, layers, tiles) {
    const grid = places(layers);
    const canvas = element("canvas", {
        className: "lofa-grid",
        width: GRID.width,
        height: GRID.top + Math.ceil(grid.height * grid.depths.length) + 2,
        tabIndex: 0,
    });
    canvas.setAttribute("aria-label", "All layers; arrow keys choose one");
    const large = images.map((_, number) => largeMap(images.length > 1 ? ["first", "second"][number] : ""));
    const list = element("dl");
    let chosen = 0;

    const choose = (number) => {
        chosen = number;
        drawGrid(canvas, images[0], tiles, grid, chosen);
        images.forEach((image, index) => {
            const context = large[index].canvas.getContext("2d");
            context.imageSmoothingEnabled = false;
            drawTile(context, image, tiles, chosen, 0, 0, LARGE, LARGE);
        });
        list.replaceChildren(...figures(layers[chosen]));
    };
    canvas.addEventListener("click", (event) => {
        const column = Math.floor((event.offsetX - GRID.left) / grid.width);
        const row = Math.floor((event.offsetY - GRID.top) / grid.height);
        const number = grid.cells.findIndex((cell) => cell.row === row && cell.column === column);
        if (number >= 0) {
            choose(number);
        }
    });
    canvas.addEventListener("keydown", (event) => {
        const next = neighbour(grid.cells, chosen, event.key);
        if (next !== chosen) {
            event.preventDefault();
            choose(next);
        }
    });
    const scale = element("div", { className: "lofa-scale" }, "0%", element("span"), "100% likely to change");
    const left = element("div", {}, canvas, list, scale);
    const right = element("div", { className: "lofa-maps" }, ...large.map((one) => one.figure));
    dialog.append(element("div", { className: "lofa-columns" }, left, right));
    choose(0);
    canvas.focus();
}

async function lookCloser(output) {
    const close = element("button", { textContent: "Close" });
    const dialog = element(
        "dialog",
        { className: "lofa-heatmap" },
        element("style", { textContent: STYLE }),
        element("h2", { textContent: "Response maps" }),
    );
    close.addEventListener("click", () => dialog.close());
    dialog.addEventListener("close", () => dialog.remove());
    dialog.addEventListener("keydown", (event) => event.stopPropagation()); // the graph has shortcuts of its own
    document.body.append(dialog);
    dialog.showModal();
    if (output) {
        try {
            const images = await Promise.all(output.lofa_pictures.map(picture));
            fillDialog(dialog, images, output.lofa_layers, output.lofa_tiles[0]);
        } catch (error) {
            if (!(error instanceof DOMException)) {
                throw error;
            }
            dialog.append(element("p", { textContent: "ComfyUI has cleared these maps. Run the workflow again." }));
        }
    } else {
        dialog.append(element("p", { textContent: "Run the workflow first." }));
    }
    dialog.append(close);
}

app.registerExtension({
    name: "lofa.responseHeatmap",
    nodeCreated(node) {
        if (node.comfyClass !== NODE) {
            return;
        }
        let output = null;
        const onExecuted = node.onExecuted;
        node.onExecuted = function (given) {
            onExecuted?.apply(this, arguments);
            output = given?.lofa_layers ? given : output;
        };
        const button = node.addWidget("button", BUTTON, null, () => lookCloser(output), { serialize: false });
        button.serialize = false; // nothing of it belongs into a saved workflow
    },
});
