// Asks OpenAI COUNT times through impit's rustls: `node impit.cjs IMPIT.node COUNT`.
const { Impit } = require(process.argv[2]);
const client = new Impit({ browser: "chrome", ignoreTlsErrors: true });
(async () => {
  for (let n = 0; n < Number(process.argv[3]); n++) {
    const asked = { model: "gpt-5-mini", messages: [{ role: "user", content: `lab[n=${n}]` }] };
    const response = await client.fetch("https://api.openai.com/v1/chat/completions", {
      method: "POST",
      headers: [["authorization", "Bearer made-up"], ["content-type", "application/json"]],
      body: Buffer.from(JSON.stringify(asked)),
    });
    await response.text();
    console.log(response.status);
  }
})();
