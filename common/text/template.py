"""The chat format as a Jinja template, for transformers' `apply_chat_template`."""

CHAT_TEMPLATE = """\
{%- for message in messages -%}
    {%- if message['role'] == 'assistant' -%}
        {{- '<|assistant|>' -}}{%- generation -%}\
{{- message['content'] + '<|endoftext|>' -}}{%- endgeneration -%}
    {%- elif message['role'] in ['system', 'user'] -%}
        {{- '<|' + message['role'] + '|>' + message['content'] -}}
    {%- else -%}
        {{- raise_exception('role ' + message['role'] + ' is none of system, user, assistant') -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}
"""
