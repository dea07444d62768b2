# A no-op job for Sidekiq that counts itself in Redis. As a program: enqueues as many as ARGV[0] says, one by one.
require "sidekiq"

redis = { url: "unix://#{ENV.fetch("REDIS_SOCKET")}" }
Sidekiq.configure_client { |c| c.redis = redis }
Sidekiq.configure_server { |c| c.redis = redis }

class Count
  include Sidekiq::Worker
  def perform
    Sidekiq.redis { |r| r.incr("bench:done") }
  end
end

ARGV[0].to_i.times { Count.perform_async } if $PROGRAM_NAME == __FILE__
