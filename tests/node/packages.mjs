// Loaded before any script here: `node --import ./packages.mjs SCRIPT`.
//
// Packages lie in the user's cache, not beside the scripts, and Node 20 takes no JSON for a module
// unless the import says so, which that of @actions/workflow-parser does not.
import { register } from "node:module";

register("./hooks.mjs", import.meta.url);
