# Completion of ditfleet for bash. All that it knows it asks the program for: `ditfleet COMMAND --help=words`.
_ditfleet() {
  local current=${COMP_WORDS[COMP_CWORD]} before=${COMP_WORDS[COMP_CWORD - 1]} words flag values
  if ((COMP_CWORD == 1)); then
    mapfile -t COMPREPLY < <(compgen -W "$("${COMP_WORDS[0]}" --help=words 2>/dev/null)" -- "$current")
    return
  fi
  words=$("${COMP_WORDS[0]}" "${COMP_WORDS[1]}" --help=words 2>/dev/null) || return 0
  while read -r flag values; do
    [[ $flag == "$before" ]] && break
  done <<<"$words"
  case $values in
    '') values=$(cut -d ' ' -f 1 <<<"$words") ;;
    FILE | DIR) ;;
    [A-Z]*) values='' ;; # something that only the user knows
  esac
  case $values in
    FILE) mapfile -t COMPREPLY < <(compgen -f -- "$current") ;;
    DIR) mapfile -t COMPREPLY < <(compgen -d -- "$current") ;;
    *) mapfile -t COMPREPLY < <(compgen -W "$values" -- "$current") ;;
  esac
}
complete -o filenames -F _ditfleet ditfleet
