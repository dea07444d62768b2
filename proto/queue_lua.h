// queue_lua.h: where the scripts' texts lie; see queue_lua.c.
#ifndef DITFLEET_QUEUE_LUA_H
#define DITFLEET_QUEUE_LUA_H

extern const char queue_lua_start[], queue_lua_end[];   // queue.lua
extern const char gather_lua_start[], gather_lua_end[]; // gather.lua

#endif
