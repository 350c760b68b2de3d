// Parse the Mermaid diagrams of a Markdown file: node .ci/mermaid.mjs MERMAID FILE
// MERMAID is dist/mermaid.esm.min.mjs of the npm package mermaid, which has all it needs in it.
import { readFileSync } from "node:fs";
import { resolve } from "node:path";
import { pathToFileURL } from "node:url";

const [library, file] = process.argv.slice(2);
const { default: mermaid } = await import(pathToFileURL(resolve(library)));
const diagrams = [...readFileSync(file, "utf8").matchAll(/^```mermaid\r?\n(.*?)^```/gms)];
try {
  if (!diagrams.length) throw new Error("no Mermaid diagram found");
  for (const [, diagram] of diagrams) {
    const { diagramType } = await mermaid.parse(diagram);
    console.log(`${file}: a ${diagramType} diagram of ${diagram.split("\n").length - 1} lines`);
  }
} catch (error) {
  console.error(`${file}: ${error.message}`); // its stack would show all of the minified source
  process.exitCode = 1;
}
