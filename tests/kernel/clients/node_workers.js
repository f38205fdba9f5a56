// Worker threads, each with a connection of its own.
const { Worker, isMainThread } = require('worker_threads');
const https = require('https');
const host = process.env.HOST, port = process.env.PORT;

if (isMainThread) {
  for (let n = 0; n < 4; n++) new Worker(__filename).on('exit', (code) => { if (code) process.exit(code); });
} else {
  https.get({ host, port, path: '/close/3000' }, (response) => {
    let n = 0;
    response.on('data', (data) => { n += data.length; });
    response.on('end', () => process.exit(n === 3000 ? 0 : 2));
  });
}
