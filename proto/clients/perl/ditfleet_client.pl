#!/usr/bin/perl
# A ditfleet client: enqueues a job, watches it, prints its outcome. Needs the module Redis (libredis-perl); the few fields
# of a job are written by hand.
#
#   perl ditfleet_client.pl REDIS MODEL URL [FIELD=VALUE...]
#
# REDIS is HOST:PORT or the path of a Unix socket, FIELD one of %FIELDS below.
# proto/PROTOCOL.md is the contract. The record under the id counts only if it is ours; see "How to submit a job" there.
use strict;
use warnings;
use Redis;

my %FIELDS = (id => 1, model => 2, prompt => 3, width => 7, height => 8, num_inference_steps => 9, seed => 13);
my %TEXT = map { $_ => 1 } qw(id model prompt);
my @STATES = qw(UNKNOWN QUEUED DELAYED LEASED RUNNING UPLOADING RETRY_WAIT SUCCEEDED DEAD CANCELLED EXPIRED);

# ---- protobuf: a field is a key, number << 3 | type, and a varint (type 0) or a length and bytes (type 2)
sub varint {
    my ($n) = (@_);
    my $bytes = '';
    for (; $n > 127; $n >>= 7) { $bytes .= chr($n & 127 | 128) }
    return $bytes . chr $n;
}

sub text_field { my ($number, $text) = @_; return varint($number << 3 | 2) . varint(length $text) . $text }

# {number => its last value}; varints are numbers, messages and strings bytes, the rest is skipped.
sub decode {
    my ($bytes) = @_;
    my ($at, %fields) = (0);
    my $next = sub {
        for (my ($n, $shift) = (0, 0);; $shift += 7) {
            my $byte = ord substr $bytes, $at++, 1;
            $n |= ($byte & 127) << $shift;
            return $n if $byte < 128;
        }
    };
    while ($at < length $bytes) {
        my $key = $next->();
        my $type = $key & 7;
        my $number = $type == 0 ? $next->() : undef;
        my $length = $type == 2 ? $next->() : $type == 1 ? 8 : $type == 5 ? 4 : 0;
        $fields{$key >> 3} = $number // substr $bytes, $at, $length;
        $at += $length;
    }
    return \%fields;
}

# The Result's fields; $on_event hears of each Event's.
sub follow {
    my ($redis, $prefix, $id, $entry, $on_event) = @_;
    my ($events, $receipt) = ("${prefix}ev:default:$id", "${prefix}ev:default:\@$entry");
    my ($last, $known) = ('0-0');
    for (;;) {
        my ($owner, $result) = $redis->hmget("${prefix}job:default:$id", 'entry', 'result');
        my $ours = ($owner // '') eq $entry;
        if (!$ours) {
            my ($same_as, $refusal) = $redis->hmget("${prefix}job:default:\@$entry", 'same_as', 'result');
            $ours = defined $same_as;
            $result = $refusal if !$ours;
        }
        # Blocks for a second at most, so that the record is read again even if no event comes.
        my @streams = $ours ? ($events, $last) : $known ? ($receipt, '0-0') : ($events, $receipt, '0-0', '0-0');
        my $news = $redis->xread(defined $result ? () : (BLOCK => 1000), STREAMS => @streams);
        $known ||= defined $news; # the record is there by now; if it is not ours, only the receipt can tell more
        for my $event ($ours && $news ? @{$news->[0][1]} : ()) {
            $last = $event->[0];
            $on_event->(decode($event->[1][1]));
        }
        return decode($result) if defined $result;
    }
}

die "usage: perl ditfleet_client.pl REDIS MODEL URL [FIELD=VALUE...]\n" if @ARGV < 3;
my ($where, $model, $url, @given) = @ARGV;
open my $random, '<:raw', '/dev/urandom' or die "/dev/urandom: $!\n";
read $random, my $id, 16;
my %job = (id => unpack('H*', $id), model => $model);
for (@given) {
    my ($name, $value) = split /=/, $_, 2;
    die "$_: a field is NAME=VALUE, NAME one of @{[sort keys %FIELDS]}\n" if !$FIELDS{$name} || !defined $value;
    $job{$name} = $value;
}
my $bytes = text_field(20, text_field(1, $url));
for (sort keys %job) { # always in one order: the same job again is the same bytes
    $bytes .= $TEXT{$_} ? text_field($FIELDS{$_}, $job{$_}) : varint($FIELDS{$_} << 3) . varint($job{$_});
}

my $redis = Redis->new($where =~ m{^/} ? (sock => $where) : (server => $where));
my $prefix = 'dit:{default}:';
my $entry = $redis->xadd("${prefix}in:default", '*', job => $bytes);
my $result = follow($redis, $prefix, $job{id}, $entry, sub {
    my ($e) = @_;
    printf STDERR "%s %s %d/%d\n", $STATES[$e->{2} // 0], $e->{3} // '', $e->{4} // 0, $e->{5} // 0;
});
my $error = $result->{4} && decode($result->{4});
print "$STATES[$result->{2}] ", $error ? "$error->{1}: $error->{2}" : decode($result->{3})->{1}, "\n";
exit($STATES[$result->{2}] ne 'SUCCEEDED');
