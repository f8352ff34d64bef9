// Tools that the page itself can run: harmless, without network, to see tool calls at work.

export const definitions = [
  {
    type: "function",
    function: {
      name: "calculator",
      description: "Compute the value of an arithmetic expression with + - * / % ^ and parentheses.",
      parameters: {
        type: "object",
        properties: { expression: { type: "string", description: "for example (3 + 4) * 12" } },
        required: ["expression"],
      },
    },
  },
  {
    type: "function",
    function: {
      name: "get_time",
      description: "The current date and time.",
      parameters: {
        type: "object",
        properties: { timezone: { type: "string", description: "for example Europe/Oslo; local if left out" } },
      },
    },
  },
];

/** Run a call; whatever goes wrong is told to the model as text. */
export function run(name, argumentsText) {
  try {
    const args = JSON.parse(argumentsText || "{}");
    if (name === "calculator") return String(evaluate(String(args.expression)));
    if (name === "get_time") return time(args.timezone);
    return `error: there is no tool ${name}`;
  } catch (error) {
    return `error: ${error.message}`;
  }
}

function time(timeZone) {
  const format = new Intl.DateTimeFormat("en-GB", { dateStyle: "full", timeStyle: "long", timeZone: timeZone || undefined });
  return format.format(new Date());
}

/** Recursive descent over numbers, + - * / % ^, unary minus and parentheses. */
function evaluate(source) {
  const tokens = source.replaceAll("**", "^").match(/\d+\.?\d*(?:e[+-]?\d+)?|\.\d+|\S/gi) ?? [];
  let at = 0;
  const take = (...wanted) => (wanted.includes(tokens[at]) ? tokens[at++] : null);

  function sum() {
    let value = product();
    for (let op; (op = take("+", "-")); ) value = op === "+" ? value + product() : value - product();
    return value;
  }
  function product() {
    let value = power();
    for (let op; (op = take("*", "/", "%")); ) {
      const right = power();
      if (op !== "*" && right === 0) throw new Error("division by zero");
      value = op === "*" ? value * right : op === "/" ? value / right : value % right;
    }
    return value;
  }
  function power() {
    if (take("-")) return -power();
    const base = atom();
    return take("^") ? base ** power() : base;
  }
  function atom() {
    if (take("(")) {
      const value = sum();
      if (!take(")")) throw new Error("a parenthesis is not closed");
      return value;
    }
    const value = Number(tokens[at]);
    if (tokens[at] === undefined || Number.isNaN(value)) throw new Error(`cannot read ${tokens[at] ?? "the end"}`);
    at += 1;
    return value;
  }

  const value = sum();
  if (at < tokens.length) throw new Error(`cannot read ${tokens[at]}`);
  return Number(value.toPrecision(12));
}
