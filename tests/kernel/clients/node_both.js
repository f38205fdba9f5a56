// https with a keep-alive agent, then fetch: both end in the OpenSSL inside node.
const https = require('https');
const host = process.env.HOST, port = process.env.PORT;
const agent = new https.Agent({ keepAlive: true, maxSockets: 2 });

function once(size) {
  return new Promise((resolve, reject) => {
    const request = https.request({
      host, port, agent, path: `/bytes/${size}`, method: 'POST',
      headers: { 'content-length': size },
    }, (response) => { let n = 0; response.on('data', (d) => { n += d.length; }); response.on('end', () => resolve(n)); });
    request.on('error', reject);
    request.end('n'.repeat(size));
  });
}

(async () => {
  for (const size of [1, 100, 20000]) if (await once(size) !== size) process.exit(2);
  await Promise.all([once(3000), once(4000), once(5000)]);
  agent.destroy();
  for (const size of [7, 30000]) {
    const response = await fetch(`https://${host}:${port}/bytes/${size}`, { method: 'POST', body: 'f'.repeat(size) });
    if ((await response.arrayBuffer()).byteLength !== size) process.exit(3);
  }
  process.exit(0);
})();
