// Shows on a node of this pack what it has to say: the report of xDiT Status, what a LoRA file left over.
import { app } from "../../scripts/app.js";

const NAME = "report";

function addText(node) {
  const text = document.createElement("textarea");
  text.readOnly = true;
  text.className = "comfy-multiline-input";
  // It is an answer, no input: neither saved with the workflow nor sent with the prompt.
  const options = { serialize: false, getValue: () => text.value, setValue: (value) => (text.value = value) };
  const widget = node.addDOMWidget(NAME, "text", text, options);
  widget.serialize = false;
  return widget;
}

app.registerExtension({
  name: "comfy_xdit.report",
  beforeRegisterNodeDef(nodeType, nodeData) {
    if (!nodeData.name.startsWith("XDiT")) return;
    const executed = nodeType.prototype.onExecuted;
    nodeType.prototype.onExecuted = function (output) {
      executed?.apply(this, arguments);
      if (!output?.text) return;
      const widget = this.widgets?.find((w) => w.name === NAME) ?? addText(this);
      widget.value = output.text.join("\n");
    };
  },
});
