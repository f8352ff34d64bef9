// The Markdown that answers use, as DOM nodes: no HTML is ever parsed, so nothing can be injected.
//
// Known are paragraphs, headings, quotes, nested lists, tables, rules, fenced code; in lines code, bold, emphasis,
// strikethrough and links with http, https and mailto addresses. A fence that is still open counts as closed.

const element = (name, ...children) => {
  const node = document.createElement(name);
  node.append(...children);
  return node;
};

const INLINE = new RegExp(
  [
    /(`{1,8})(?!`)(.{1,999}?)(?<!`)\1(?!`)/, // code; bounded, so that no line takes quadratic time
    /\*\*(?=\S)(.{1,999}?)(?<=\S)\*\*/, // bold
    /(?<![\w*])\*(?=[^\s*])(.{1,999}?)(?<=[^\s*])\*(?![\w*])/, // emphasis
    /(?<!\w)_(?=[^\s_])(.{1,999}?)(?<=[^\s_])_(?!\w)/,
    /~~(?=\S)(.{1,999}?)(?<=\S)~~/, // strikethrough
    /\[([^[\]]{1,999})\]\(((?:https?:\/\/|mailto:)[^\s()]{1,2000})\)/, // link
    /(?<![\w/])(https?:\/\/[^\s<>"'`]{0,2000}[^\s<>"'`.,:;!?)\]])/, // bare address
  ].map((pattern) => pattern.source).join("|"),
  "g",
);

function link(address, ...children) {
  const node = element("a", ...children);
  node.href = address;
  node.rel = "noopener noreferrer nofollow";
  node.target = "_blank";
  return node;
}

/** Nodes of a line. */
function inline(text) {
  const nodes = [];
  let at = 0;
  for (const match of text.matchAll(INLINE)) {
    nodes.push(text.slice(at, match.index));
    const [whole, , code, bold, starred, lined, struck, label, address, bare] = match;
    if (code !== undefined) nodes.push(element("code", code.replace(/^ (.*[^ ].*) $/, "$1")));
    else if (bold !== undefined) nodes.push(element("strong", ...inline(bold)));
    else if (starred !== undefined || lined !== undefined) nodes.push(element("em", ...inline(starred ?? lined)));
    else if (struck !== undefined) nodes.push(element("s", ...inline(struck)));
    else if (address !== undefined) nodes.push(link(address, label));
    else nodes.push(link(bare, bare));
    at = match.index + whole.length;
  }
  nodes.push(text.slice(at));
  return nodes;
}

/** Lines with a line break between them. */
function lines(block) {
  return block.flatMap((line, index) => (index ? [document.createElement("br"), ...inline(line)] : inline(line)));
}

const FENCE = /^ {0,3}(`{3,}|~{3,})\s*([\w+#.-]*)/;
const HEADING = /^ {0,3}(#{1,6})\s+(.*?)\s*#*$/;
const ITEM = /^(\s*)(?:[-*+]|(\d{1,9})[.)])(?:\s+(.*)|$)/;
const QUOTE = /^ {0,3}> ?(.*)/;
const RULE = /^ {0,3}([-*_])(?:\s*\1){2,}\s*$/;
const TABLE_RULE = /^\s*\|?\s*:?-+:?\s*(\|\s*:?-+:?\s*)*\|?\s*$/;

/** Nodes of a text. */
export function markdown(text) {
  return blocks(text.replaceAll("\r\n", "\n").split("\n"), 0);
}

const MAX_DEPTH = 16; // of quotes and lists in each other; deeper ones are text

function blocks(source, depth) {
  const nodes = [];
  let paragraph = [];
  const endParagraph = () => {
    if (paragraph.length) nodes.push(element("p", ...lines(paragraph)));
    paragraph = [];
  };
  let at = 0;
  while (at < source.length) {
    const line = source[at];
    const fence = line.match(FENCE);
    const heading = line.match(HEADING);
    if (!line.trim()) {
      endParagraph();
      at += 1;
    } else if (fence) {
      endParagraph();
      at = code(source, at, fence, nodes);
    } else if (heading) {
      endParagraph();
      nodes.push(element(`h${Math.min(5, heading[1].length + 2)}`, ...inline(heading[2])));
      at += 1;
    } else if (RULE.test(line)) {
      endParagraph();
      nodes.push(element("hr"));
      at += 1;
    } else if (QUOTE.test(line) && depth < MAX_DEPTH) {
      endParagraph();
      const inner = [];
      for (; at < source.length && QUOTE.test(source[at]); at++) inner.push(source[at].match(QUOTE)[1]);
      nodes.push(element("blockquote", ...blocks(inner, depth + 1)));
    } else if (ITEM.test(line) && depth < MAX_DEPTH) {
      endParagraph();
      at = list(source, at, nodes, depth);
    } else if (line.includes("|") && TABLE_RULE.test(source[at + 1] ?? "") && source[at + 1].includes("-")) {
      endParagraph();
      at = table(source, at, nodes);
    } else {
      paragraph.push(line);
      at += 1;
    }
  }
  endParagraph();
  return nodes;
}

/** Fenced code from line `at`; an open fence counts as closed at the end. Returns the line behind it. */
function code(source, at, fence, nodes) {
  const inside = [];
  const end = (line) => line.trim().startsWith(fence[1]) && !line.trim().slice(fence[1].length).trim();
  for (at += 1; at < source.length && !end(source[at]); at++) inside.push(source[at]);
  const body = element("code", inside.join("\n"));
  if (fence[2]) body.dataset.language = fence[2];
  const box = element("div", element("pre", body));
  box.className = "code";
  nodes.push(box);
  return at + 1;
}

/** A list from line `at`: its items have its indentation, what is indented further belongs to the item above. */
function list(source, at, nodes, depth) {
  const [, indent, number] = source[at].match(ITEM);
  const node = element(number === undefined ? "ul" : "ol");
  if (number !== undefined && number !== "1") node.start = Number(number);
  nodes.push(node);
  while (at < source.length) {
    const item = source[at].match(ITEM);
    if (!item || item[1].length > indent.length + 1 || item[1].length < indent.length) break;
    if ((item[2] === undefined) !== (number === undefined) || RULE.test(source[at])) break;
    const rest = [];
    for (at += 1; at < source.length; at++) {
      const line = source[at];
      const deeper = line.match(/^\s*/)[0].length > indent.length + 1;
      const next = source.slice(at + 1).find((later) => later.trim());
      if (!line.trim() ? !next || next.match(/^\s*/)[0].length <= indent.length + 1 : !deeper) break;
      rest.push(line.slice(Math.min(indent.length + 2, line.match(/^\s*/)[0].length)));
    }
    node.append(element("li", ...inline(item[3] ?? ""), ...blocks(rest, depth + 1)));
    // An empty line between two items does not end the list.
    if (at + 1 < source.length && !source[at].trim() && ITEM.test(source[at + 1])) at += 1;
  }
  return at;
}

const cells = (line) => line.trim().replace(/^\|/, "").replace(/\|$/, "").split(/(?<!\\)\|/).map((cell) => cell.trim().replaceAll("\\|", "|"));

function table(source, at, nodes) {
  const head = element("tr", ...cells(source[at]).map((cell) => element("th", ...inline(cell))));
  const body = element("tbody");
  for (at += 2; at < source.length && source[at].includes("|"); at++) {
    body.append(element("tr", ...cells(source[at]).map((cell) => element("td", ...inline(cell)))));
  }
  const box = element("div", element("table", element("thead", head), body));
  box.className = "table";
  nodes.push(box);
  return at;
}
