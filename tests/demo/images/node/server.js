// A small web service on packages as they are in use; answers 200 on /.
'use strict';

const bodyParser = require('body-parser');
const express = require('express');
const lodash = require('lodash');
const moment = require('moment');
const semver = require('semver');
const winston = require('winston');
const WebSocket = require('ws');
const yargs = require('yargs');

const port = yargs(process.argv.slice(2)).default('port', 18081).argv.port;
const log = winston.createLogger({ transports: [new winston.transports.Console()] });
const application = express();
application.use(bodyParser.json());
application.get('/', (request, response) => {
  response.json({ now: moment().format(), node: semver.parse(process.version).major, words: lodash.words('ready to serve') });
});
const server = application.listen(port, '127.0.0.1', () => log.info(`listening on ${port}`));
new WebSocket.Server({ server });
