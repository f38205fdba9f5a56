// Run Node's own clients in the lab: `node node.mjs fetch|https FIRST COUNT [stream]`.
// Prints one JSON line each with the id the provider gave.
import https from "node:https";

const [client, first, count, mode] = [
  process.argv[2], Number(process.argv[3]), Number(process.argv[4]), process.argv[5],
];
const url = "https://api.openai.com/v1/chat/completions";
const body = (n) =>
  JSON.stringify({
    model: "gpt-5-mini",
    messages: [{ role: "user", content: `lab[n=${n}]` }],
    ...(mode === "stream" ? { stream: true, stream_options: { include_usage: true } } : {}),
  });
const headers = { "content-type": "application/json", authorization: "Bearer made-up" };

const withFetch = async (n) =>
  (await fetch(url, { method: "POST", headers, body: body(n) })).text();
const agent = new https.Agent({ keepAlive: true, maxSockets: 5 });
const withHttps = (n) =>
  new Promise((resolve, reject) => {
    const request = https.request(url, { method: "POST", headers, agent }, (response) => {
      let text = "";
      response.on("data", (piece) => (text += piece));
      response.on("end", () => resolve(text));
    });
    request.on("error", reject);
    request.end(body(n));
  });

const ask = client === "fetch" ? withFetch : withHttps;
const texts = await Promise.all(Array.from({ length: count }, (_, i) => ask(first + i)));
for (const text of texts) console.log(JSON.stringify({ id: /"id":"([^"]+)"/.exec(text)[1] }));
agent.destroy();
