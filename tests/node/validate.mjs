// What GitHub's language service says to workflows and actions: a file of files, findings on stdout.
//
//   {"files": {".github/workflows/ci.yml": "..."},      to be judged
//    "local": {"actions/setup/action.yml": "..."},      to be looked up
//    "actions": {"actions/checkout@SHA": {"inputs": {...}, "outputs": {...}}}}
//   [{"file": "...", "line": 1, "column": 1, "message": "..."}]
//
// Findings are errors and warnings alike: a warning of the editor is an error at two in the morning.
import { readFile } from "node:fs/promises";

import { validate } from "@actions/languageservice";
import { TextDocument } from "vscode-languageserver-textdocument";

const { files, local, actions } = JSON.parse(await readFile(process.argv[2], "utf8"));

const config = {
  fileProvider: {
    getFileContent: async ({ path }) => {
      if (!(path in local)) throw new Error(`${path} does not exist`);
      return { name: path, content: local[path] };
    },
  },
  actionsMetadataProvider: {
    fetchActionMetadata: async ({ owner, name, path, ref }) =>
      actions[`${[owner, name, ...(path ? [path] : [])].join("/")}@${ref}`],
  },
};

const findings = [];
for (const [file, text] of Object.entries(files)) {
  const document = TextDocument.create(file, "yaml", 1, text);
  for (const { range, message } of await validate(document, config)) {
    const { line, character } = range.start;
    findings.push({ file, line: line + 1, column: character + 1, message });
  }
}
process.stdout.write(JSON.stringify(findings));
