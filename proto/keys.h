// keys.h: the names of the queue's keys that C code touches itself. queue.lua builds the others in the same way.
//
// All keys of a queue start with "dit:{QUEUE}:"; the braces make a cluster put them into one slot.
#ifndef DITFLEET_KEYS_H
#define DITFLEET_KEYS_H

enum { KEY_MAX_QUEUE = 64, KEY_SIZE = 320 }; // a key with queue, tenant and id at their longest fits KEY_SIZE

#define KEY_PREFIX "dit:{%s}:"   // queue; also KEYS[1] of the script
#define KEY_IN     "%sin:%s"     // prefix, tenant: STREAM, the door
#define KEY_JOB    "%sjob:%s:%s" // prefix, tenant, id: HASH, the record
#define KEY_EVENTS "%sev:%s:%s"  // prefix, tenant, id: STREAM
#define KEY_MODELS "%smodels"    // HASH, the registry
#define KEY_LIVE   "%slive"      // ZSET, every non-final job
#define KEY_WAKE   "%swake"      // STREAM, something became ready
#define KEY_NODES  "%sgroup:%s"  // prefix, worker group: HASH, where its nodes stand
#define KEY_GROUP  "admit"       // the doors' consumer group

#endif
