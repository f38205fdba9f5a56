// NAME COUNT: COUNT requests by a library as its documentation calls it; run where its packages are.
import { createRequire } from "node:module";
import path from "node:path";
import { pathToFileURL } from "node:url";

const [name, count] = [process.argv[2], Number(process.argv[3])];
const require = createRequire(path.join(process.cwd(), "package.json"));
const load = (wanted) => import(pathToFileURL(require.resolve(wanted)).href);
const url = "https://api.openai.com/v1/chat/completions";
const messages = [{ role: "user", content: "say lab[n=3&chunks=4]" }];
const json = { model: "gpt-5-mini", messages };
const headers = { "content-type": "application/json", authorization: "Bearer made-up" };

const clients = {
  async ai_openai() {
    const { generateText } = await load("ai");
    const { openai } = await load("@ai-sdk/openai");
    return () => generateText({ model: openai.chat("gpt-5-mini"), prompt: messages[0].content });
  },
  async ai_anthropic() {
    const { generateText } = await load("ai");
    const { anthropic } = await load("@ai-sdk/anthropic");
    return () => generateText({ model: anthropic("claude-haiku-4-5"), prompt: messages[0].content });
  },
  async langchain() {
    const { ChatOpenAI } = await load("@langchain/openai");
    const model = new ChatOpenAI({ model: "gpt-5-mini" });
    return () => model.invoke(messages[0].content);
  },
  async openai() {
    const { default: OpenAI } = await load("openai");
    const client = new OpenAI();
    return () => client.chat.completions.create(json);
  },
  async anthropic() {
    const { default: Anthropic } = await load("@anthropic-ai/sdk");
    const client = new Anthropic();
    return () => client.messages.create({ model: "claude-haiku-4-5", max_tokens: 100, messages });
  },
  async google() {
    const { GoogleGenAI } = await load("@google/genai");
    const client = new GoogleGenAI({ apiKey: process.env.GEMINI_API_KEY });
    return () =>
      client.models.generateContent({ model: "gemini-2.5-flash", contents: messages[0].content });
  },
  async got() {
    const { default: got } = await load("got");
    return () => got.post(url, { json, headers, http2: true }).json();
  },
  async axios() {
    const { default: axios } = await load("axios");
    return () => axios.post(url, json, { headers });
  },
  async undici() {
    const { request, Agent } = await load("undici");
    const dispatcher = new Agent({ allowH2: true });
    return async () => {
      const answer = await request(url, { method: "POST", headers, body: JSON.stringify(json), dispatcher });
      return answer.body.text();
    };
  },
  async worker_threads() {
    const { Worker } = await import("node:worker_threads");
    const code = `fetch(${JSON.stringify(url)}, ${JSON.stringify({
      method: "POST", headers, body: JSON.stringify(json),
    })}).then((answer) => answer.text())`;
    return () =>
      new Promise((ended) => new Worker(code, { eval: true }).on("exit", ended));
  },
};

const ask = await clients[name]();
for (let n = 0; n < count; n += 1) await ask();
process.exit(0);
