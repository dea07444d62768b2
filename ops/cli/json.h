// json.h: a protobuf message as JSON, by its descriptor, so that no field is forgotten when one is added.
#ifndef DITFLEET_CLI_JSON_H
#define DITFLEET_CLI_JSON_H

#include <jansson.h>
#include <protobuf-c/protobuf-c.h>

// An object with the names of the .proto file. Enums are the short names that flags take ("cpu-f32", "SUCCEEDED"). Left
// out: empty strings and lists, messages and oneofs that are not set. Integers are numbers; above 2^63 - 1, which
// JSON libraries cannot hold, text. NULL: out of memory.
json_t *json_from_message(const ProtobufCMessage *m);

// Prints one object on a line of stdout, and frees it.
void json_print(json_t *object);

#endif
