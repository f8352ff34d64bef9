// The little of Markdown that answers use, as DOM nodes: no HTML is ever parsed, so nothing can be injected.

const element = (name, ...children) => {
  const node = document.createElement(name);
  node.append(...children);
  return node;
};

/** Nodes of a line: `code`, **bold** and *emphasis*. */
function inline(text) {
  const nodes = [];
  const pattern = /`([^`]+)`|\*\*([^*]+)\*\*|(?<![\w*])\*([^*\s][^*]*)\*(?![\w*])/g;
  let at = 0;
  for (const match of text.matchAll(pattern)) {
    nodes.push(text.slice(at, match.index));
    const [whole, code, bold, emphasis] = match;
    if (code !== undefined) nodes.push(element("code", code));
    else if (bold !== undefined) nodes.push(element("strong", bold));
    else nodes.push(element("em", emphasis));
    at = match.index + whole.length;
  }
  nodes.push(text.slice(at));
  return nodes;
}

/** Lines with a line break between them. */
function lines(block) {
  return block.flatMap((line, index) => (index ? [document.createElement("br"), ...inline(line)] : inline(line)));
}

/** Nodes of a text: paragraphs, headings, lists, fenced code. An open fence counts as closed at the end. */
export function markdown(text) {
  const nodes = [];
  let paragraph = [];
  let list = null;
  let code = null;
  const endParagraph = () => {
    if (paragraph.length) nodes.push(element("p", ...lines(paragraph)));
    paragraph = [];
    list = null;
  };
  for (const line of text.split("\n")) {
    if (code) {
      if (line.trim().startsWith("```")) code = null;
      else code.append((code.textContent ? "\n" : "") + line);
      continue;
    }
    const item = line.match(/^\s*(?:[-*]|(\d+)[.)])\s+(.*)/);
    const heading = line.match(/^#{1,6}\s+(.*)/);
    if (line.trim().startsWith("```")) {
      endParagraph();
      code = element("code");
      nodes.push(element("pre", code));
    } else if (heading) {
      endParagraph();
      nodes.push(element("h3", ...inline(heading[1])));
    } else if (item) {
      const kind = item[1] ? "ol" : "ul";
      if (paragraph.length || list?.localName !== kind) {
        endParagraph();
        list = element(kind);
        if (item[1]) list.start = Number(item[1]);
        nodes.push(list);
      }
      list.append(element("li", ...inline(item[2])));
    } else if (!line.trim()) {
      endParagraph();
    } else {
      list = null;
      paragraph.push(line);
    }
  }
  endParagraph();
  return nodes;
}
