-- What wrk sends, and one line of JSON about what came back. See scripts/bench-gateway.py.
--
--     wrk … -s load.lua URL -- GET|POST BODY PATH…     each thread goes round the paths

function init(args)
  wrk.method = args[1]
  if args[2] ~= "" then
    wrk.body = args[2]
    wrk.headers["Content-Type"] = "application/json"
  end
  paths, turn = {}, 0
  for i = 3, #args do
    paths[#paths + 1] = args[i]
  end
end

function request()
  turn = turn % #paths + 1
  return wrk.format(nil, paths[turn])
end

function done(summary, latency, requests)
  io.stderr:write(string.format(
    '{"answers": %d, "seconds": %.3f, "p50_ms": %.3f, "p99_ms": %.3f, "other_status": %d, "broken": %d}\n',
    summary.requests, summary.duration / 1e6, latency:percentile(50) / 1000, latency:percentile(99) / 1000,
    summary.errors.status, summary.errors.connect + summary.errors.read + summary.errors.write + summary.errors.timeout))
end
