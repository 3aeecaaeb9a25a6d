// Serves the number of requests and of timer ticks so far.
const http = require('http');

let hits = 0;
let ticks = 0;
setInterval(() => { ticks += 1; }, 10);

http.createServer((request, response) => {
  hits += 1;
  response.setHeader('Content-Type', 'application/json');
  response.end(JSON.stringify({ hits, ticks, pid: process.pid }));
}).listen(Number(process.env.PORT || 8080), '0.0.0.0');
