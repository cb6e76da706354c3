// What GitHub's own evaluator says to expressions: a file of questions, answers on stdout.
//
//   [{"expression": "a && b", "condition": true, "context": {"github": {...}}, "status": "success"}]
//   [{"value": false}, {"error": "..."}]
//
// `condition` evaluates as the runner does an `if:`: without a status function `success()` is put
// before it, and what comes out is a boolean. `status` is that of the jobs, or steps, before.
import { readFile } from "node:fs/promises";

import { data, Evaluator, Lexer, Parser } from "@actions/expressions";
import { truthy } from "@actions/expressions/result";
import { ensureStatusFunction } from "@actions/workflow-parser/model/converter/if-condition";

const CONTEXTS = ["github", "needs", "strategy", "matrix", "job", "runner", "env", "vars",
  "secrets", "steps", "inputs", "jobs"];
const STATUSES = ["success", "failure", "cancelled", "always"];
// As the schema of the language names what an `if:` may use.
const ALLOWED = [...CONTEXTS, ...STATUSES.map((name) => `${name}(0,0)`)];

function functions(status) {
  return new Map(STATUSES.map((name) => [name, {
    name,
    description: "",
    minArgs: 0,
    maxArgs: 0,
    call: () => new data.BooleanData(name === "always" || name === status),
  }]));
}

function ask({ expression, condition = false, context = {}, status = "success" }) {
  const text = condition
    ? ensureStatusFunction(expression, { allowedContext: ALLOWED }) : expression;
  const known = functions(status);
  const tree = new Parser(new Lexer(text).lex().tokens, CONTEXTS, [...known.values()]).parse();
  const given = Object.fromEntries(CONTEXTS.map((name) => [name, context[name] ?? {}]));
  const wrapped = JSON.parse(JSON.stringify(given), data.reviver);
  const value = new Evaluator(tree, wrapped, known).evaluate();
  return condition ? truthy(value) : JSON.parse(JSON.stringify(value, data.replacer));
}

const answers = JSON.parse(await readFile(process.argv[2], "utf8")).map((question) => {
  try {
    return { value: ask(question) };
  } catch (error) {
    return { error: error.message };
  }
});
process.stdout.write(JSON.stringify(answers));
