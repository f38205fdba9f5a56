// Asks Anthropic `count` times, one after the other: `bun fetch.mjs FIRST COUNT [stream]`.
const [first, count, mode] = process.argv.slice(2);
for (let n = Number(first); n < Number(first) + Number(count); n++) {
  const response = await fetch("https://api.anthropic.com/v1/messages", {
    method: "POST",
    headers: { "x-api-key": "made-up", "content-type": "application/json" },
    body: JSON.stringify({
      model: "claude-haiku-4-5",
      max_tokens: 100,
      stream: mode === "stream",
      messages: [{ role: "user", content: `lab[n=${n}&chunks=6]` }],
    }),
  });
  await response.text();
  console.log(response.status);
}
