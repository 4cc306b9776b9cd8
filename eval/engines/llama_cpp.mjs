// llama.cpp for eval/engines/llama_cpp.py, which says what the lines are.
//     node llama_cpp.mjs NODE_MODULES MODEL.gguf THREADS CONTEXT
import {createInterface} from "node:readline";
import {join} from "node:path";
import {pathToFileURL} from "node:url";

const [modules, modelPath, threads, contextSize] = process.argv.slice(2);
const entry = pathToFileURL(join(modules, "node-llama-cpp", "dist", "index.js"));
const {getLlama, LlamaLogLevel} = await import(entry.href);
const llama = await getLlama({
    gpu: false, build: "never", maxThreads: +threads, logLevel: LlamaLogLevel.error
});
const model = await llama.loadModel({modelPath});
const context = await model.createContext({
    contextSize: +contextSize, batchSize: +contextSize, threads: +threads
});
const sequence = context.getSequence();
console.log(JSON.stringify({release: llama.llamaCppRelease.release}));

for await (const line of createInterface({input: process.stdin})) {
    const {prompt, tokens} = JSON.parse(line);
    await sequence.clearHistory();
    let left = tokens;
    for await (const token of sequence.evaluate(prompt, {temperature: 0, yieldEogToken: true})) {
        process.stdout.write(`${token}\n`);
        if (--left === 0) break;
    }
}
process.exit(0);
