#!/usr/bin/env ruby
# A ditfleet client: enqueues a job, watches it, prints its outcome. Needs redis and google-protobuf (ruby-redis,
# ruby-google-protobuf).
#
#   protoc --proto_path=SOURCE --ruby_out=DIR proto/job.proto     # once
#   ruby -I DIR ditfleet_client.rb REDIS MODEL URL [FIELD=VALUE...]
#
# REDIS is a URL (redis://HOST, unix:///PATH); FIELD is one of Job's texts and numbers: prompt, width, seed.
# proto/PROTOCOL.md is the contract. The record under the id counts only if it is ours; see "How to submit a job" there.
require 'redis'
require 'securerandom'
require 'proto/job_pb'

class Fleet
  include Ditfleet::V1

  def initialize(url, queue: 'default', tenant: 'default')
    @redis = Redis.new(url.start_with?('unix://') ? { path: url.delete_prefix('unix://') } : { url: url })
    @prefix, @tenant = "dit:{#{queue}}:", tenant
  end

  # Returns the receipt by which the outcome is found.
  def submit(job)
    @redis.xadd("#{@prefix}in:#{@tenant}", { job: Job.encode(job) })
  end

  # Returns the Result; yields each Event.
  def wait(id, entry)
    events, receipt = key('ev', id), key('ev', "@#{entry}")
    last, known = '0-0', false
    loop do
      ours, found = look(id, entry)
      # Blocks for a second at most, so that the record is read again even if no event comes.
      streams = ours ? [events] : known ? [receipt] : [events, receipt]
      news = @redis.xread(streams, ours ? [last] : streams.map { '0-0' }, block: found ? nil : 1000)
      known ||= !news.empty? # the record is there by now; if it is not ours, only the receipt can tell more
      (ours ? news.fetch(events, []) : []).each do |at, fields|
        last = at
        yield Event.decode(fields['event'])
      end
      return Result.decode(found) if found
    end
  end

  private

  def key(kind, name)
    "#{@prefix}#{kind}:#{@tenant}:#{name}"
  end

  # [is the record under the id ours, the Result's bytes or nil]
  def look(id, entry)
    owner, result = @redis.hmget(key('job', id), 'entry', 'result')
    return [true, result] if owner == entry

    same_as, refusal = @redis.hmget(key('job', "@#{entry}"), 'same_as', 'result')
    same_as ? [true, result] : [false, refusal]
  end
end

abort 'usage: ditfleet_client.rb REDIS MODEL URL [FIELD=VALUE...]' if ARGV.size < 3
redis, model, url, *fields = ARGV
output = Ditfleet::V1::Output.new(url: url)
job = Ditfleet::V1::Job.new(id: SecureRandom.uuid, model: model, output: output)
fields.each do |field|
  name, value = field.split('=', 2)
  type = Ditfleet::V1::Job.descriptor.lookup(name)&.type
  abort "#{name}: no text or number of a Job" unless value && %i[string uint32 uint64 float].include?(type)
  job[name] = { string: :to_s, float: :to_f }.fetch(type, :to_i).to_proc.call(value)
end
fleet = Fleet.new(redis)
result = fleet.wait(job.id, fleet.submit(job)) do |event|
  warn "#{event.state.to_s.delete_prefix('STATE_')} #{event.stage} #{event.step}/#{event.steps}"
end
outcome = result.error ? "#{result.error.code}: #{result.error.message}" : result.images.map(&:location).join(' ')
puts "#{result.state.to_s.delete_prefix('STATE_')} #{outcome}"
exit result.state == :STATE_SUCCEEDED
