// `node older.mjs HOST`: an HTTP/2 connection that makes a request for each line it reads.
// A line is the request's body; the answer's id is printed when it has come.
import http2 from "node:http2";
import readline from "node:readline";

const session = http2.connect(`https://${process.argv[2]}`);
for await (const line of readline.createInterface({ input: process.stdin })) {
  const request = session.request({
    ":method": "POST",
    ":path": "/v1/messages",
    "content-type": "application/json",
    "x-api-key": "made-up",
  });
  request.end(line);
  let text = "";
  for await (const part of request) text += part;
  console.log(/"id": ?"(msg_\w+)"/.exec(text)?.[1] ?? text.length);
}
session.close();
