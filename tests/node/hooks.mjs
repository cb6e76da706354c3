// How a name becomes a module here; packages.mjs says why.
import { readFile } from "node:fs/promises";
import { pathToFileURL } from "node:url";

const packages = pathToFileURL(`${process.env.GGUF_FLEET_NODE_PACKAGES}/package.json`).href;

export function resolve(name, context, next) {
  const bare = !/^(node:|file:|data:|\.|\/)/.test(name);
  const ours = context.parentURL?.startsWith(new URL(".", import.meta.url).href);
  return next(name, bare && ours ? { ...context, parentURL: packages } : context);
}

export async function load(url, context, next) {
  if (!url.startsWith("file:") || !url.endsWith(".json")) return next(url, context);
  const source = `export default ${await readFile(new URL(url), "utf8")}`;
  return { format: "module", source, shortCircuit: true };
}
