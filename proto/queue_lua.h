// queue_lua.h: where the script's text lies; see queue_lua.c.
#ifndef DITFLEET_QUEUE_LUA_H
#define DITFLEET_QUEUE_LUA_H

extern const char queue_lua_start[], queue_lua_end[];

#endif
